"""What the aggregator knows, on disk: SQLite (WAL, synchronous FULL) and a folder of files.

Nothing is acknowledged before it is committed here. Each method that changes something is one
transaction.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from aggregator.commands import SCHEMA as COMMANDS_SCHEMA
from aggregator.commands import STORE_FILE, CommandTable
from aggregator.devices import SCHEMA as DEVICES_SCHEMA
from aggregator.devices import Devices
from aggregator.errors import StoreError
from aggregator.history import SCHEMA as HISTORY_SCHEMA
from aggregator.history import History
from aggregator.issued import SCHEMA as ISSUED_SCHEMA
from aggregator.issued import Issued
from aggregator.parts import Parts
from aggregator.places import Place
from aggregator.rounds import Policy, RoundState
from aggregator.steering import Steering
from aggregator.turns import Turns
from aggregator.uploads import SCHEMA as UPLOADS_SCHEMA
from aggregator.uploads import Uploads
from aggregator.window import SCHEMA as WINDOW_SCHEMA
from aggregator.window import StoredWindow
from protocol.begun import difference
from protocol.database import FULL, Database, DatabaseDamaged
from protocol.errors import os_words
from protocol.faults import fault_point
from protocol.messages import GlobalManifest, Job

RESERVE_BYTES = 64 << 20
"""Left free of uploads, for versions, the database, and what else is on that disk."""
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
  number INTEGER PRIMARY KEY, version INTEGER NOT NULL, seconds REAL NOT NULL,
  weights TEXT NOT NULL, residual REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS versions (
  version INTEGER PRIMARY KEY, manifest TEXT NOT NULL) STRICT;
"""
SCHEMA = "".join(
    (
        _TABLES,
        UPLOADS_SCHEMA,
        DEVICES_SCHEMA,
        ISSUED_SCHEMA,
        HISTORY_SCHEMA,
        COMMANDS_SCHEMA,
        WINDOW_SCHEMA,
    )
)


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
                folder / STORE_FILE,
                SCHEMA,
                self.on_disk,
                before_commit=self._parts.sync,
                after_commit=self._parts.settle,
                after_rollback=self._forget,
            )
        except DatabaseDamaged as error:
            raise StoreError(self._damaged(error)) from None
        except OSError as error:
            if error.errno in FULL:
                raise StoreError(self._refused(error)) from None
            raise StoreError(
                f"can't keep the aggregator's state in {folder}: {os_words(error)}; name a folder "
                "that can be written to with --state"
            ) from None
        self._turns = Turns(folder)
        self.history = History(self._db)
        self.commands = CommandTable(self._db)
        self.devices = Devices(self._db, self.history)
        self.issued = Issued(self._db)
        self.window = StoredWindow(self._db)
        self.uploads = Uploads(
            self._db, self._parts, folder / "updates", self.on_disk, self.history
        )
        # Whoever has the turn does so too before it merges, which may take long.
        with self.on_disk(), self._turns.take(wait=False) as is_mine:
            if is_mine:
                self.uploads.finish_keeping()

    def close(self) -> None:
        self._db.close()

    def _forget(self) -> None:
        """Forget what was noted beside rows that are not committed."""
        self._parts.forget()
        self.devices.forget()
        self.uploads.forget_answers()

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
            raise StoreError(self._refused(error)) from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does as one, or none of it; inside another it is a part of that.

        Raises:
            StoreError: the disk is full, or not in order.
        """
        with self.turn(), self._db.transaction():
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep other processes from changing rows or files of this state within the block.

        Raises:
            StoreError: the disk is full, or not in order.
        """
        with ExitStack() as stack:
            with self.on_disk():
                stack.enter_context(self._turns.take())
            yield

    def has_room(self, size: int) -> bool:
        """Say whether a file of this size, in bytes, leaves the reserve of the disk free."""
        with self.on_disk():
            return shutil.disk_usage(self.folder).free >= RESERVE_BYTES + size

    # -- where the job stands --------------------------------------------------------------------

    def check_job(self, job: Job) -> None:
        """Refuse a job that this store is not of.

        Raises:
            StoreError: it belongs to a job with other settings.
        """
        known = self._meta("job")
        if known is not None and (other := difference(known, job)):
            raise StoreError(
                f"{self.folder} belongs to job {other}; name another "
                "--state folder and another job, or go on with what it was begun with"
            )

    def bind_job(self, job: Job) -> None:
        """Remember whose store this is.

        Raises:
            StoreError: it belongs to a job with other settings.
        """
        self.check_job(job)
        self._set_meta("job", job.model_dump_json())

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
        with self.transaction():
            self._set_meta("round", json.dumps(asdict(state)))
            if state.state == "open":
                self.history.opened(state.number, time.time())

    def steering(self) -> Steering:
        """Return what an operator has changed while the job was served."""
        known = self._meta("steering")
        return Steering() if known is None else Steering(**json.loads(known))

    def set_steering(self, steering: Steering) -> None:
        with self.transaction():
            self._set_meta("steering", json.dumps(asdict(steering)))

    def policy(self) -> Policy:
        """Return what the job file said of rounds when it was last read to be served."""
        known = self._meta("policy")
        return Policy() if known is None else Policy(**json.loads(known))

    def set_policy(self, policy: Policy) -> None:
        """Remember what the job file says of rounds, for who looks at this state."""
        with self.transaction():
            self._set_meta("policy", json.dumps(asdict(policy)))

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
            self.uploads.forget_unfinished(number - late_updates)
            self.history.ended(number, time.time())
            self._set_meta("carried", json.dumps(carried or {}))
            beside()
            self.set_round(after)
            fault_point("aggregator.round.settling")

    def merged_version(self, number: int) -> int | None:
        """Return the version that a round was merged into; None: it is not merged."""
        row = self._db.one("SELECT version FROM rounds WHERE number = ?", number)
        return row[0] if row else None

    def begin_anew(
        self, after: RoundState, manifest: GlobalManifest, *, ended: RoundState, note: str
    ) -> None:
        """Commit a version that no merge has made; an open round ends, and `note` says why.

        What a rule would carry to the next round is of the versions that are left, and goes.
        """
        with self.transaction():
            self.add_version(manifest)
            if ended.state == "open":
                self.history.ended(ended.number, time.time(), note)
                self.uploads.forget_unfinished(ended.number)
            self._set_meta("carried", "{}")
            self.set_round(after)

    def carried(self) -> dict[str, CarriedFile]:
        """Return the files that the last merge handed on, by what they hold."""
        known = json.loads(self._meta("carried") or "{}")
        return {kind: CarriedFile(*fields) for kind, fields in known.items()}

    @property
    def memory_folder(self) -> Path:
        return self.folder / "memory"

    def add_version(self, manifest: GlobalManifest) -> None:
        with self.transaction():
            self._db.run(
                "INSERT OR REPLACE INTO versions VALUES (?, ?)",
                manifest.version,
                manifest.model_dump_json(),
            )
            self.history.published(manifest)

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

    # -- private ---------------------------------------------------------------------------------

    def _refused(self, error: OSError) -> str:
        return (
            f"can't use the aggregator's state in {self.folder}: {error.strerror}; make room "
            "there, or mend that disk, and start it again: nothing that a device has been told is "
            "lost"
        )

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


@lru_cache(maxsize=4)
def _global_manifest(text: str) -> GlobalManifest:
    """Read the manifest of a version, which is asked for with each upload of its round."""
    return GlobalManifest.model_validate_json(text)
