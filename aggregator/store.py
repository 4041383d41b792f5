"""What the aggregator knows, on disk: SQLite (WAL, synchronous FULL) and a folder of files.

Nothing is acknowledged before it is committed here. Each method that changes something is one
transaction.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from aggregator.errors import StoreError
from aggregator.rounds import RoundState
from protocol.chunks import assemble
from protocol.faults import fault_point
from protocol.files import write_durably
from protocol.messages import GlobalManifest, Status, UploadManifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS devices (
  name TEXT PRIMARY KEY, public_key TEXT NOT NULL, status TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS conduct (
  device TEXT PRIMARY KEY, strikes INTEGER NOT NULL, quarantine REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS uploads (
  upload TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL, manifest TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('receiving', 'counted', 'rejected')),
  reason TEXT NOT NULL DEFAULT '', changed REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS chunks (
  upload TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (upload, number)) STRICT;
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


class Store:
    """Open the store of one job in a folder, making it if need be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "store.sqlite", isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"can't keep the aggregator's state in {folder}: {error}; name a folder that can "
                "be written to with --state"
            ) from None

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # -- where the job stands --------------------------------------------------------------------

    def bind_job(self, job: str) -> None:
        """Remember whose store this is.

        Raises:
            StoreError: it belongs to a job with other settings.
        """
        known = self._meta("job")
        if known is not None and known != job:
            raise StoreError(
                f"{self.folder} belongs to a job with other settings; name another --state "
                "folder, or go on with the settings it was begun with"
            )
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
        self._set_meta("round", _round_json(state))

    def finish_round(
        self,
        after: RoundState,
        manifest: GlobalManifest,
        *,
        number: int,
        seconds: float,
        weights: dict[str, float],
        residual: float,
    ) -> None:
        """Commit a merge: its version, its figures and the state after it, in one transaction."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?)",
                (manifest.version, manifest.model_dump_json()),
            )
            db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                (number, manifest.version, seconds, json.dumps(weights), residual),
            )
            _put(db, "round", _round_json(after))
            fault_point("aggregator.round.settling")

    def add_version(self, manifest: GlobalManifest) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?)",
                (manifest.version, manifest.model_dump_json()),
            )

    def version(self, number: int) -> GlobalManifest | None:
        row = self._one("SELECT manifest FROM versions WHERE version = ?", number)
        return GlobalManifest.model_validate_json(row[0]) if row else None

    def band_file(self, version: int, band: str) -> Path:
        return self.folder / "versions" / str(version) / f"{band}.safetensors"

    # -- devices ---------------------------------------------------------------------------------

    def device_key(self, device: str) -> str | None:
        row = self._one("SELECT public_key FROM devices WHERE name = ?", device)
        return row[0] if row else None

    def set_status(self, status: Status, public_key: str) -> bool:
        """Remember how a device is; return False for a status older than the one known.

        Whose key has changed (which the caller has allowed) counts its starts anew.
        """
        known = self.status(status.device)
        same = self.device_key(status.device) == public_key
        if known is not None and same and known.boot > status.boot:
            return False
        with self._transaction() as db:
            db.execute(
                "INSERT INTO devices VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET "
                "status = excluded.status, public_key = excluded.public_key",
                (status.device, public_key, status.model_dump_json()),
            )
        return True

    def status(self, device: str) -> Status | None:
        row = self._one("SELECT status FROM devices WHERE name = ?", device)
        return Status.model_validate_json(row[0]) if row else None

    def ready_devices(self) -> set[str]:
        """Return the devices that are online and can train."""
        rows = self._db.execute("SELECT status FROM devices").fetchall()
        every = [Status.model_validate_json(row[0]) for row in rows]
        return {s.device for s in every if s.online and s.state not in ("unfit", "stopped")}

    def strike(self, device: str, limit: int, until: float) -> bool:
        """Note a refused update; after `limit` in a row quarantine begins and True is returned."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO conduct VALUES (?, 1, 0) "
                "ON CONFLICT (device) DO UPDATE SET strikes = strikes + 1",
                (device,),
            )
            begun = db.execute(
                "UPDATE conduct SET strikes = 0, quarantine = ? WHERE device = ? AND strikes >= ?",
                (until, device, limit),
            )
            return begun.rowcount > 0

    def forgive(self, device: str) -> None:
        """Forget what was refused before: an update of the device has been counted."""
        self._db.execute("DELETE FROM conduct WHERE device = ?", (device,))

    def quarantine(self, device: str) -> float:
        """Return until when a device is kept out, in seconds since 1970; 0 if it never was."""
        row = self._db.execute(
            "SELECT quarantine FROM conduct WHERE device = ?", (device,)
        ).fetchone()
        return row[0] if row else 0.0

    def quarantined(self, now: float) -> set[str]:
        rows = self._db.execute("SELECT device FROM conduct WHERE quarantine > ?", (now,))
        return {row[0] for row in rows}

    # -- uploads ---------------------------------------------------------------------------------

    def upload(self, upload: str) -> Upload | None:
        row = self._one("SELECT manifest, state, reason FROM uploads WHERE upload = ?", upload)
        return Upload(UploadManifest.model_validate_json(row[0]), row[1], row[2]) if row else None

    def expect_upload(self, manifest: UploadManifest) -> None:
        """Begin an upload, or begin it again when the device now offers other bytes.

        A device has one upload open: what it left of others is forgotten.
        """
        known = self.upload(manifest.upload)
        if known is not None and known.manifest == manifest:
            return
        with self._transaction() as db:
            others = "device = ? AND (upload = ? OR state = 'receiving')"
            whose = (manifest.device, manifest.upload)
            db.execute(
                f"DELETE FROM chunks WHERE upload IN (SELECT upload FROM uploads WHERE {others})",
                whose,
            )
            db.execute(f"DELETE FROM uploads WHERE {others}", whose)
            db.execute(
                "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, 'receiving', '', ?)",
                (
                    manifest.upload,
                    manifest.device,
                    manifest.round,
                    manifest.model_dump_json(),
                    time.time(),
                ),
            )

    def add_chunk(self, upload: str, number: int, data: bytes) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", (upload, number, data))
            fault_point("aggregator.chunk.inserted")

    def missing_chunks(self, manifest: UploadManifest) -> list[int]:
        rows = self._db.execute("SELECT number FROM chunks WHERE upload = ?", (manifest.upload,))
        have = {row[0] for row in rows}
        return [n for n in range(len(manifest.file.chunks)) if n not in have]

    def assembled(self, manifest: UploadManifest) -> bytes:
        """Return the file of a complete upload.

        Raises:
            BadChunk: the whole is not what was announced.
        """
        rows = self._db.execute(
            "SELECT data FROM chunks WHERE upload = ? ORDER BY number", (manifest.upload,)
        )
        return assemble((row[0] for row in rows), manifest.file.bytes, manifest.file.sha256)

    def count_upload(self, manifest: UploadManifest, data: bytes) -> None:
        """Keep a verified update and count it to its round: once, whatever happens."""
        write_durably(self.update_file(manifest), data)
        fault_point("aggregator.upload.kept")
        self._settle_upload(manifest.upload, "counted", "")

    def reject_upload(self, manifest: UploadManifest, reason: str) -> None:
        self.expect_upload(manifest)
        self._settle_upload(manifest.upload, "rejected", reason)

    def _settle_upload(self, upload: str, state: str, reason: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM chunks WHERE upload = ?", (upload,))
            db.execute(
                "UPDATE uploads SET state = ?, reason = ?, changed = ? WHERE upload = ?",
                (state, reason, time.time(), upload),
            )
            fault_point("aggregator.upload.settling")

    def update_file(self, manifest: UploadManifest) -> Path:
        """Return where an update is kept: under the hash of its content."""
        return self.folder / "updates" / f"{manifest.file.sha256}.safetensors"

    def uploads_of(self, round_number: int, *states: str) -> list[UploadManifest]:
        """Return the uploads of a round in these states, in the order of their devices' names."""
        marks = ", ".join("?" * len(states))
        rows = self._db.execute(
            f"SELECT manifest FROM uploads WHERE round = ? AND state IN ({marks}) ORDER BY device",
            (round_number, *states),
        )
        return [UploadManifest.model_validate_json(row[0]) for row in rows]

    # -- private ---------------------------------------------------------------------------------

    def _one(self, query: str, *values: object) -> tuple[str, ...] | None:
        row: tuple[str, ...] | None = self._db.execute(query, values).fetchone()
        return row

    def _meta(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else None

    def _set_meta(self, key: str, value: str) -> None:
        with self._transaction() as db:
            _put(db, key, value)


def _put(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _round_json(state: RoundState) -> str:
    return json.dumps(
        {
            "number": state.number,
            "state": state.state,
            "version": state.version,
            "deadline": state.deadline,
        }
    )
