"""What the aggregator knows, on disk: SQLite (WAL, synchronous FULL) and a folder of files.

Nothing is acknowledged before it is committed here. Each method that changes something is one
transaction.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from aggregator.devices import SCHEMA as DEVICES_SCHEMA
from aggregator.devices import Devices
from aggregator.errors import StoreError
from aggregator.issued import SCHEMA as ISSUED_SCHEMA
from aggregator.issued import Issued
from aggregator.mistakes import first_difference
from aggregator.parts import Parts
from aggregator.places import Place
from aggregator.rounds import RoundState
from protocol.chunks import check_file
from protocol.database import Database, DatabaseDamaged
from protocol.errors import os_words
from protocol.faults import fault_point
from protocol.messages import GlobalManifest, UploadManifest

RESERVE_BYTES = 64 << 20
"""Left free of uploads, for versions, the database, and what else is on that disk."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS uploads (
  upload TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL, manifest TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('receiving', 'counted', 'rejected')),
  reason TEXT NOT NULL DEFAULT '', changed REAL NOT NULL) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_of_a_device_counts ON uploads (device, round)
  WHERE state = 'counted';
CREATE TABLE IF NOT EXISTS late (
  upload TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL,
  UNIQUE (device, round)) STRICT;
CREATE TABLE IF NOT EXISTS arrived (
  upload TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (upload, number)) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
  number INTEGER PRIMARY KEY, version INTEGER NOT NULL, seconds REAL NOT NULL,
  weights TEXT NOT NULL, residual REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS versions (
  version INTEGER PRIMARY KEY, manifest TEXT NOT NULL) STRICT;
"""


class Upload(NamedTuple):
    """Hold an upload as the store knows it."""

    manifest: UploadManifest
    state: str
    reason: str


class CarriedFile(NamedTuple):
    """Name a file of what a rule carries to the next round, in `Store.memory_folder`."""

    name: str
    sha256: str
    scale: float


class Store:
    """Open the store of one job in a folder, making it if need be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = Parts(folder / "uploads")
        try:
            self._db = Database(
                folder / "store.sqlite",
                SCHEMA + DEVICES_SCHEMA + ISSUED_SCHEMA,
                self.on_disk,
                before_commit=self._parts.sync,
                after_commit=self._parts.settle,
                after_rollback=self._parts.forget,
            )
        except DatabaseDamaged as error:
            raise StoreError(self._damaged(error)) from None
        except OSError as error:
            raise StoreError(
                f"can't keep the aggregator's state in {folder}: {os_words(error)}; name a folder "
                "that can be written to with --state"
            ) from None
        self.devices = Devices(self._db)
        self.issued = Issued(self._db)
        self._finish_keeping()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Say in words what the disk refuses inside the block.

        Raises:
            StoreError: the disk is full, or not in order.
        """
        try:
            yield
        except DatabaseDamaged as error:
            raise StoreError(self._damaged(error)) from None
        except OSError as error:
            raise StoreError(
                f"can't use the aggregator's state in {self.folder}: {error.strerror}; make room "
                "there, or mend that disk, and start it again: nothing that a device has been "
                "told is lost"
            ) from None

    def transaction(self) -> AbstractContextManager[None]:
        """Commit what the block does as one, or none of it; inside another it is a part of that.

        Raises:
            StoreError: the disk is full, or not in order.
        """
        return self._db.transaction()

    def has_room(self, size: int) -> bool:
        """Say whether a file of this size, in bytes, leaves the reserve of the disk free."""
        with self.on_disk():
            return shutil.disk_usage(self.folder).free >= RESERVE_BYTES + size

    # -- where the job stands --------------------------------------------------------------------

    def check_job(self, job: str) -> None:
        """Refuse a job, as JSON, that this store is not of.

        Raises:
            StoreError: it belongs to a job with other settings.
        """
        known = self._meta("job")
        if known is not None and known != job:
            raise StoreError(
                f"{self.folder} belongs to job {first_difference(known, job)}; name another "
                "--state folder and another job, or go on with what it was begun with"
            )

    def bind_job(self, job: str) -> None:
        """Remember whose store this is.

        Raises:
            StoreError: it belongs to a job with other settings.
        """
        self.check_job(job)
        self._set_meta("job", job)

    def job(self) -> str | None:
        """Return the job this store belongs to, as JSON."""
        return self._meta("job")

    def round(self) -> RoundState:
        """Return where the job stands; a fresh store waits before round 1 with no version."""
        known = self._meta("round")
        if known is None:
            return RoundState(0, "waiting", 0, None)
        return RoundState(**json.loads(known))

    def set_round(self, state: RoundState) -> None:
        self._set_meta("round", json.dumps(asdict(state)))

    def finish_round(
        self,
        after: RoundState,
        manifest: GlobalManifest,
        *,
        number: int,
        seconds: float,
        weights: dict[str, float],
        residual: float,
        carried: Mapping[str, CarriedFile] | None = None,
        late_updates: int = 0,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Commit a merge: its version, its figures and the state after it, in one transaction.

        `carried` are the files that the next round is handed, by what they hold; `beside` is called
        for what is to be committed beside the common version. Uploads that were not whole by then
        come too late, and go, but for those of the last `late_updates` rounds.
        """
        with self.transaction():
            self.add_version(manifest)
            self._db.run(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                number,
                manifest.version,
                seconds,
                json.dumps(weights),
                residual,
            )
            self._forget("state = 'receiving' AND round <= ?", number - late_updates)
            self._set_meta("carried", json.dumps(carried or {}))
            beside()
            self.set_round(after)
            fault_point("aggregator.round.settling")

    def carried(self) -> dict[str, CarriedFile]:
        """Return the files that the last merge handed on, by what they hold."""
        known = json.loads(self._meta("carried") or "{}")
        return {kind: CarriedFile(*fields) for kind, fields in known.items()}

    @property
    def memory_folder(self) -> Path:
        return self.folder / "memory"

    def add_version(self, manifest: GlobalManifest) -> None:
        self._db.run(
            "INSERT OR REPLACE INTO versions VALUES (?, ?)",
            manifest.version,
            manifest.model_dump_json(),
        )

    def version(self, number: int) -> GlobalManifest | None:
        row = self._db.one("SELECT manifest FROM versions WHERE version = ?", number)
        return _global_manifest(row[0]) if row else None

    def version_numbers(self) -> set[str]:
        return {str(row[0]) for row in self._db.rows("SELECT version FROM versions")}

    def forget_versions(self, keep: int) -> None:
        """Forget all versions but the newest `keep`; their files stay."""
        newest = "(SELECT max(version) FROM versions)"
        self._db.run(f"DELETE FROM versions WHERE version <= {newest} - ?", keep)

    @property
    def versions_folder(self) -> Path:
        return self.folder / "versions"

    @property
    def personal_folder(self) -> Path:
        return self.folder / "personal"

    def band_file(self, place: Place, band: str) -> Path:
        return self.folder / place.folder / f"{band}.safetensors"

    # -- uploads ---------------------------------------------------------------------------------

    def upload(self, upload: str) -> Upload | None:
        row = self._db.one("SELECT manifest, state, reason FROM uploads WHERE upload = ?", upload)
        return Upload(_manifest(row[0]), row[1], row[2]) if row else None

    def has_counted(self, device: str, round_number: int) -> bool:
        """Say whether an update that a device trained for a round counts, or a late one in it."""
        trained = "SELECT upload FROM uploads WHERE device = ? AND round = ? AND state = 'counted'"
        late = "SELECT upload FROM late WHERE device = ? AND round = ?"
        which = (device, round_number) * 2
        return self._db.one(f"{trained} UNION ALL {late}", *which) is not None

    def expect_upload(self, manifest: UploadManifest) -> None:
        """Begin an upload, or begin it again when the device now offers other bytes.

        A device has one upload open: what it left of others is forgotten.
        """
        known = self.upload(manifest.upload)
        if known is not None and known.manifest == manifest:
            return
        with self.transaction():
            others = "device = ? AND (upload = ? OR state = 'receiving')"
            self._forget(others, manifest.device, manifest.upload)
            self._db.run(
                "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, 'receiving', '', ?)",
                manifest.upload,
                manifest.device,
                manifest.round,
                manifest.model_dump_json(),
                time.time(),
            )

    def add_chunk(self, manifest: UploadManifest, number: int, data: bytes) -> None:
        with self.transaction():
            self._parts.write(manifest, number, data)
            self._db.run("INSERT OR IGNORE INTO arrived VALUES (?, ?)", manifest.upload, number)
            fault_point("aggregator.chunk.inserted")

    def is_complete(self, manifest: UploadManifest) -> bool:
        """Say whether all chunks of an upload are here."""
        row = self._db.one("SELECT count(*) FROM arrived WHERE upload = ?", manifest.upload)
        return row is not None and row[0] >= len(manifest.file.chunks)

    def missing_chunks(self, manifest: UploadManifest) -> list[int]:
        rows = self._db.rows("SELECT number FROM arrived WHERE upload = ?", manifest.upload)
        have = {row[0] for row in rows}
        return [n for n in range(len(manifest.file.chunks)) if n not in have]

    def assembled(self, manifest: UploadManifest) -> bytes:
        """Return the file of a complete upload.

        Raises:
            BadChunk: the whole is not what was announced.
        """
        with self.on_disk():
            data = self._parts.file(manifest).read_bytes()
        check_file(data, manifest.file.bytes, manifest.file.sha256)
        return data

    def count_upload(self, manifest: UploadManifest, *, late_for: int | None = None) -> None:
        """Keep a verified update and count it to its round: once, whatever happens.

        One that comes too late for its round counts in the round `late_for`.
        """
        with self.transaction():
            if late_for is not None:
                late = manifest.upload, manifest.device, late_for
                self._db.run("INSERT INTO late VALUES (?, ?, ?)", *late)
            self._parts.keep(manifest, self.update_file(manifest))
            self._settle_upload(manifest, "counted", "")

    def reject_upload(self, manifest: UploadManifest, reason: str) -> None:
        self.expect_upload(manifest)
        self._settle_upload(manifest, "rejected", reason)

    def _settle_upload(self, manifest: UploadManifest, state: str, reason: str) -> None:
        with self.transaction():
            self._parts.drop(manifest)
            self._db.run("DELETE FROM arrived WHERE upload = ?", manifest.upload)
            self._db.run(
                "UPDATE uploads SET state = ?, reason = ?, changed = ? WHERE upload = ?",
                state,
                reason,
                time.time(),
                manifest.upload,
            )
            fault_point("aggregator.upload.settling")

    def _finish_keeping(self) -> None:
        """Give those updates their names that were counted just before a crash."""
        with self.transaction():
            for manifest in self._needed():
                self._parts.keep(manifest, self.update_file(manifest))

    @property
    def parts_folder(self) -> Path:
        return self._parts.folder

    def needed_parts(self) -> set[Path]:
        """Return the files of uploads that are not whole yet."""
        rows = self._db.rows("SELECT manifest FROM uploads WHERE state = 'receiving'")
        return {self._parts.file(_manifest(row[0])) for row in rows}

    @property
    def updates_folder(self) -> Path:
        return self.folder / "updates"

    def update_file(self, manifest: UploadManifest) -> Path:
        """Return where an update is kept: under the hash of its content."""
        return self.updates_folder / f"{manifest.file.sha256}.safetensors"

    def needed_updates(self) -> set[Path]:
        """Return the files of updates that count in the last merged round, or in a later one."""
        return {self.update_file(manifest) for manifest in self._needed()}

    def _needed(self) -> list[UploadManifest]:
        merged = "(SELECT coalesce(max(number), 0) FROM rounds)"
        query = f"""SELECT manifest FROM uploads WHERE state = 'counted' AND (round >= {merged} OR
          upload IN (SELECT upload FROM late WHERE round >= {merged}))"""
        return [_manifest(row[0]) for row in self._db.rows(query)]

    def uploads_of(self, round_number: int, *states: str) -> list[UploadManifest]:
        """Return the uploads of a round in these states, in the order of their devices' names.

        What came late is of the round in which it counts.
        """
        marks = ", ".join("?" * len(states))
        query = f"""SELECT manifest FROM uploads WHERE state IN ({marks})
          AND (round = ? AND upload NOT IN (SELECT upload FROM late)
            OR upload IN (SELECT upload FROM late WHERE round = ?)) ORDER BY device"""
        rows = self._db.rows(query, *states, round_number, round_number)
        return [_manifest(row[0]) for row in rows]

    # -- private ---------------------------------------------------------------------------------

    def _damaged(self, error: DatabaseDamaged) -> str:
        return (
            f"the aggregator's state in {self.folder} can't be read: store.sqlite is damaged "
            f"({error}); bring the folder back from a backup, or begin anew with another --state "
            "folder and job name"
        )

    def _meta(self, key: str) -> str | None:
        row = self._db.one("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else None

    def _set_meta(self, key: str, value: str) -> None:
        self._db.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def _forget(self, which: str, *values: object) -> None:
        """Delete the uploads of which an SQL condition holds, their parts after the commit."""
        for row in self._db.rows(f"SELECT manifest FROM uploads WHERE {which}", *values):
            manifest = _manifest(row[0])
            for table in ("arrived", "uploads"):
                self._db.run(f"DELETE FROM {table} WHERE upload = ?", manifest.upload)
            self._parts.drop(manifest)


@lru_cache(maxsize=256)
def _manifest(text: str) -> UploadManifest:
    """Read a manifest, whose hashes are many and which is asked for with each of its chunks."""
    return UploadManifest.model_validate_json(text)


@lru_cache(maxsize=4)
def _global_manifest(text: str) -> GlobalManifest:
    """Read the manifest of a version, which is asked for with each upload of its round."""
    return GlobalManifest.model_validate_json(text)
