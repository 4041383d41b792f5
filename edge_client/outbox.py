"""What a device must not forget: finished updates until they are counted, its rank, its boots.

SQLite in WAL mode with synchronous FULL: an update is here before it is published, and leaves
only when the aggregator has said `done` or `reject`.
"""

from __future__ import annotations

import sqlite3
from math import inf
from pathlib import Path
from typing import NamedTuple

from edge_client.errors import ConfigError
from protocol.errors import Replayed
from protocol.faults import fault_point
from protocol.messages import Job, Round, UploadManifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS updates (
  upload TEXT PRIMARY KEY, round INTEGER NOT NULL, manifest TEXT NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS jobs (job TEXT PRIMARY KEY, settings TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS numbers (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
"""


class Pending(NamedTuple):
    """Hold an update that waits to be counted."""

    manifest: UploadManifest
    data: bytes


class Outbox:
    """Open the outbox in a device's state folder."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "outbox.sqlite", isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"can't keep this device's state in {folder}: {error}; name a folder that can be "
                "written to with --state"
            ) from None

    def close(self) -> None:
        self._db.close()

    def put(self, manifest: UploadManifest, data: bytes, *, rank: int) -> None:
        """Keep a finished update, and the rank the device goes on with, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute(
            "INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?)",
            (manifest.upload, manifest.round, manifest.model_dump_json(), data),
        )
        self._set(f"rank of {manifest.job}", rank)
        self._set(f"round of {manifest.job}", manifest.round)
        fault_point("device.outbox.putting")
        self._db.execute("COMMIT")
        fault_point("device.outbox.put")

    def get(self, upload: str) -> Pending | None:
        row = self._db.execute(
            "SELECT manifest, data FROM updates WHERE upload = ?", (upload,)
        ).fetchone()
        return Pending(UploadManifest.model_validate_json(row[0]), row[1]) if row else None

    def pending(self) -> list[str]:
        """Return the ids of the updates that wait, oldest round first."""
        rows = self._db.execute("SELECT upload FROM updates ORDER BY round")
        return [row[0] for row in rows.fetchall()]

    def drop(self, upload: str) -> None:
        """Forget an update: it has been counted, or refused for good."""
        fault_point("device.outbox.dropping")
        self._db.execute("DELETE FROM updates WHERE upload = ?", (upload,))
        fault_point("device.outbox.dropped")

    def rank(self, job: str, default: int) -> int:
        """Return the rank that the device goes on with in a job."""
        return self._number(f"rank of {job}", default)

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

    # -- what the aggregator has said, so that it can't be said again when it is old ---------------

    def check_job(self, job: Job) -> None:
        """Remember a job's settings at first sight.

        Raises:
            Replayed: they are other ones than before.
        """
        row = self._db.execute("SELECT settings FROM jobs WHERE job = ?", (job.job,)).fetchone()
        if row is None:
            self._db.execute("INSERT INTO jobs VALUES (?, ?)", (job.job, job.model_dump_json()))
        elif Job.model_validate_json(row[0]) != job:
            raise Replayed(
                f"job {job.job!r} has other settings than this device has begun it with; new "
                "settings need another job name"
            )

    def check_round(self, now: Round) -> None:
        """Remember the newest round and version of a job.

        Raises:
            Replayed: one of them is older than what was seen before.
        """
        for kind, number in (("round", now.number), ("version", now.version)):
            seen = self._number(f"seen {kind} of {now.job}", 0)
            if number < seen:
                raise Replayed(f"{kind} {number} of job {now.job!r} is older than {kind} {seen}")
        for kind, number in (("round", now.number), ("version", now.version)):
            if number > self._number(f"seen {kind} of {now.job}", 0):
                self._set(f"seen {kind} of {now.job}", number)

    def _number(self, key: str, default: int) -> int:
        row = self._db.execute("SELECT value FROM numbers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else default

    def next_boot(self) -> int:
        """Count this start of the agent and return its number."""
        boot = self._number("boot", 0) + 1
        self._set("boot", boot)
        return boot

    def _set(self, key: str, value: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (key, value))
