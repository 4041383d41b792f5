"""What a device must not forget: finished updates until they are counted, its rank, its boots.

Also what each day has cost, for the owner's policy limits that.

SQLite in WAL mode with synchronous FULL: an update is here before it is published, and leaves
only when the aggregator has said `done` or `reject`.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from functools import partial
from math import inf
from pathlib import Path
from typing import NamedTuple

from edge_client.errors import StorageError
from edge_client.storage import keeping
from protocol.begun import difference
from protocol.database import Database
from protocol.errors import Replayed
from protocol.faults import fault_point
from protocol.messages import Job, Round, UploadManifest

FILE = "outbox.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS updates (
  upload TEXT PRIMARY KEY, round INTEGER NOT NULL, manifest TEXT NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS jobs (job TEXT PRIMARY KEY, settings TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS numbers (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS own_losses (
  job TEXT PRIMARY KEY, version INTEGER NOT NULL, loss REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS days (
  day TEXT PRIMARY KEY, bytes INTEGER NOT NULL, training_s REAL NOT NULL
) STRICT;
"""


class Pending(NamedTuple):
    """Hold an update that waits to be counted."""

    manifest: UploadManifest
    data: bytes


class Totals(NamedTuple):
    """Hold what there is to say of an outbox: updates of all jobs, and what a day has cost."""

    pending: int = 0
    counted: int = 0
    bytes: int = 0
    training_s: float = 0.0


def look(folder: Path, day: str) -> Totals:
    """Read a device's outbox without touching it, also while an agent has it; or nothing.

    Raises:
        StorageError: it can't be read, or is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return Totals()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            if not {"updates", "numbers"} <= tables:  # begun, and nothing is in it yet
                return Totals()
            (pending,) = db.execute("SELECT count(*) FROM updates").fetchone()
            (counted,) = db.execute(
                "SELECT coalesce(sum(value), 0) FROM numbers WHERE key LIKE 'counted in %'"
            ).fetchone()
            query = "SELECT bytes, training_s FROM days WHERE day = ?"
            used = db.execute(query, (day,)).fetchone() if "days" in tables else None
    except sqlite3.DatabaseError as error:
        how = "if it is damaged, bring it back from a backup, or begin anew with another --state"
        raise StorageError(f"can't read {path}: {error}; {how} and another --name") from None
    return Totals(pending, counted, *(used or (0, 0.0)))


class Outbox:
    """Open the outbox in a device's state folder; a replay's, `in_memory`, ends with its process.

    Raises, as every method does:
        StorageError: the disk is full, or the file is damaged or can't be written.
    """

    def __init__(self, folder: Path, *, in_memory: bool = False) -> None:
        guard = partial(keeping, FILE, folder)
        with guard():
            self._db = Database(folder / FILE, SCHEMA, guard, in_memory=in_memory)

    def close(self) -> None:
        self._db.close()

    def put(
        self,
        manifest: UploadManifest,
        data: bytes,
        *,
        rank: int,
        own_loss: float | None = None,
        drawn_rows: int = 0,
    ) -> None:
        """Keep a finished update, and what the device goes on with, in one transaction.

        That is its rank, the loss of what it trained (see `own_loss`), and how far it is in its
        text.
        """
        with self._db.transaction():
            self._db.run(
                "INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?)",
                manifest.upload,
                manifest.round,
                manifest.model_dump_json(),
                data,
            )
            self._set(f"rank of {manifest.job}", rank)
            self._set(f"drawn rows of {manifest.job}", drawn_rows)
            self._set(f"round of {manifest.job}", manifest.round)
            self._set(f"attempt of {manifest.job}", manifest.attempt)
            self._set(f"refused in {manifest.job}", 0)
            self._db.run("DELETE FROM own_losses WHERE job = ?", manifest.job)
            if own_loss is not None:
                row = manifest.job, manifest.version, own_loss
                self._db.run("INSERT INTO own_losses VALUES (?, ?, ?)", *row)
            fault_point("device.outbox.putting")
        fault_point("device.outbox.put")

    def get(self, upload: str) -> Pending | None:
        row = self._db.one("SELECT manifest, data FROM updates WHERE upload = ?", upload)
        return Pending(UploadManifest.model_validate_json(row[0]), row[1]) if row else None

    def pending(self, job: str = "") -> list[str]:
        """Return the ids of the updates that wait, of one job or all, oldest round first."""
        rows = self._db.rows(
            "SELECT upload FROM updates WHERE ? IN ('', json_extract(manifest, '$.job')) "
            "ORDER BY round",
            job,
        )
        return [row[0] for row in rows]

    def drop(self, upload: str, *, counted_in: str = "") -> None:
        """Forget an update: it has been counted in a job, or refused for good."""
        fault_point("device.outbox.dropping")
        with self._db.transaction():
            self._db.run("DELETE FROM updates WHERE upload = ?", upload)
            if counted_in:
                key = f"counted in {counted_in}"
                self._set(key, self._number(key, 0) + 1)
        fault_point("device.outbox.dropped")

    def refuse(self, manifest: UploadManifest) -> None:
        """Forget an update that was refused; its round may be trained for once more."""
        with self._db.transaction():
            self.drop(manifest.upload)
            if manifest.round == self.trained_round(manifest.job):
                self._set(f"refused in {manifest.job}", 1)
                self._db.run("DELETE FROM own_losses WHERE job = ?", manifest.job)

    def rank(self, job: str, default: int) -> int:
        """Return the rank that the device goes on with in a job."""
        return self._number(f"rank of {job}", default)

    def drawn_rows(self, job: str) -> int:
        """Return how many rows of its text the device has drawn for a job's rounds, in all."""
        return self._number(f"drawn rows of {job}", 0)

    def own_loss(self, job: str, version: int) -> float | None:
        """Return the loss of what the device trained, on its trust split, in nats a token.

        None if what it trained last did not start from `version`, or was refused.
        """
        row = self._db.one("SELECT version, loss FROM own_losses WHERE job = ?", job)
        return row[1] if row and row[0] == version else None

    def ceiling_mib(self, job: str) -> float:
        """Return the predicted peak that was too much in a job; plans stay below it."""
        ceiling = self._number(f"ceiling of {job} (KiB)", 0)
        return ceiling / 1024 if ceiling else inf

    def lower_ceiling(self, job: str, predicted_mib: float) -> None:
        """Remember that training with this predicted peak was killed."""
        self._set(f"ceiling of {job} (KiB)", int(predicted_mib * 1024))

    def trained_round(self, job: str) -> int:
        """Return the last round of a job that the device has trained for."""
        return self._number(f"round of {job}", 0)

    def is_due(self, now: Round) -> bool:
        """Say whether a round has not been trained for, or in vain in an earlier attempt."""
        if self._number(f"refused in {now.job}", 0):
            trained = self.trained_round(now.job), self._number(f"attempt of {now.job}", 0)
            return trained < (now.number, now.attempt)
        return self.trained_round(now.job) < now.number

    # -- what a day has cost -----------------------------------------------------------------------

    def used(self, day: str) -> tuple[int, float]:
        """Return the bytes that went through the network on a day, and the seconds of training."""
        row = self._db.one("SELECT bytes, training_s FROM days WHERE day = ?", day)
        return (row[0], row[1]) if row else (0, 0.0)

    def use(self, day: str, *, bytes_more: int, training_more_s: float) -> None:
        """Add to what a day has cost."""
        self._db.run(
            "INSERT INTO days VALUES (?, ?, ?) ON CONFLICT (day) DO UPDATE SET "
            "bytes = bytes + excluded.bytes, training_s = training_s + excluded.training_s",
            day,
            bytes_more,
            training_more_s,
        )

    # -- what the aggregator has said, so that it can't be said again when it is old ---------------

    def check_job(self, job: Job) -> None:
        """Remember a job's settings at first sight.

        Raises:
            Replayed: they are other ones than before.
        """
        row = self._db.one("SELECT settings FROM jobs WHERE job = ?", job.job)
        if row is None:
            self._db.run("INSERT INTO jobs VALUES (?, ?)", job.job, job.model_dump_json())
        elif other := difference(row[0], job):
            raise Replayed(
                f"this device has begun job {other}; other settings need another job name"
            )

    def check_round(self, now: Round) -> None:
        """Remember the newest round, its newest attempt, and the newest version of a job.

        Raises:
            Replayed: one of them is older than what was seen before.
        """
        told = {"round": now.number, "version": now.version, "attempt": now.attempt}
        seen = {kind: self._number(f"seen {kind} of {now.job}", 0) for kind in told}
        if now.number != seen["round"]:
            seen["attempt"] = 0  # that was another round's
        self._check_seen(now.job, told, seen)

    def check_personal(self, job: str, version: int) -> None:
        """Remember the newest version of which the device has been given an adapter of its own.

        Raises:
            Replayed: this one is older.
        """
        kind = "personal version"
        self._check_seen(job, {kind: version}, {kind: self._number(f"seen {kind} of {job}", 0)})

    def _check_seen(self, job: str, told: dict[str, int], seen: dict[str, int]) -> None:
        for kind, number in told.items():
            if number < seen[kind]:
                raise Replayed(f"{kind} {number} of job {job!r} is older than {kind} {seen[kind]}")
        if told != seen:
            with self._db.transaction():
                for kind, number in told.items():
                    self._set(f"seen {kind} of {job}", number)

    def _number(self, key: str, default: int) -> int:
        row = self._db.one("SELECT value FROM numbers WHERE key = ?", key)
        return row[0] if row else default

    def next_boot(self, now_s: float | None = None) -> int:
        """Return a number for this start of the agent: larger than that of any start before.

        By the clock too: a device restored from a copy does not count the same starts again.
        """
        boot = max(self._number("boot", 0) + 1, int(time.time() if now_s is None else now_s))
        self._set("boot", boot)
        return boot

    def _set(self, key: str, value: int) -> None:
        self._db.run("INSERT OR REPLACE INTO numbers VALUES (?, ?)", key, value)
