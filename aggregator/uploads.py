"""Uploads as the aggregator knows them: what of each has come, and which of them count."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from aggregator.history import History
from aggregator.parts import Parts
from aggregator.rounds import Answers
from protocol.chunks import check_file
from protocol.database import Database
from protocol.faults import fault_point
from protocol.messages import UploadManifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads (
  upload TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL, manifest TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('receiving', 'counted', 'rejected')),
  reason TEXT NOT NULL DEFAULT '', changed REAL NOT NULL) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_of_a_device_counts ON uploads (device, round)
  WHERE state = 'counted';
CREATE TABLE IF NOT EXISTS late (
  upload TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL,
  UNIQUE (device, round)) STRICT;
CREATE TABLE IF NOT EXISTS buffered (upload TEXT PRIMARY KEY, round INTEGER NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS buffered_in ON buffered (round);
CREATE VIEW IF NOT EXISTS behind AS
  SELECT upload, round FROM late UNION ALL SELECT upload, round FROM buffered;
CREATE TABLE IF NOT EXISTS arrived (
  upload TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (upload, number)) STRICT;
"""


class Upload(NamedTuple):
    """Hold an upload as the store knows it."""

    manifest: UploadManifest
    state: str
    reason: str


class Uploads:
    """Hold the uploads of one job, in the store's database, whose transactions they are part of.

    Bytes grow in `parts`; those of updates that count are in the files of `folder`.
    """

    def __init__(
        self,
        db: Database,
        parts: Parts,
        folder: Path,
        on_disk: Callable[[], AbstractContextManager[None]],
        history: History,
    ) -> None:
        self._db = db
        self._parts = parts
        self.folder = folder
        self._on_disk = on_disk
        self._history = history
        self._answered: tuple[tuple[int, int, int], Answers] | None = None
        """Who has answered in one round's attempt, and as of what commit of another process."""

    def forget_answers(self) -> None:
        """Ask the database again who has answered: what was noted since is not committed."""
        self._answered = None

    def answered(self, round_number: int, attempt: int) -> Answers:
        """Return whose update counts in a round, and whose of its attempt was refused.

        Asked with each message, it is kept up here, until another process (a shared intake, say)
        commits something; it is not to be changed.
        """
        place = round_number, attempt, self._db.others_commits()
        if self._answered is None or self._answered[0] != place:
            answers = Answers(round_number)
            for manifest in self.of_round(round_number, "counted"):
                answers.add(manifest)
            for manifest in self.of_round(round_number, "rejected"):
                if manifest.attempt == attempt:
                    answers.refused.add(manifest.device)
            self._answered = place, answers
        return self._answered[1]

    def known(self, upload: str) -> Upload | None:
        row = self._db.one("SELECT manifest, state, reason FROM uploads WHERE upload = ?", upload)
        return Upload(_manifest(row[0]), row[1], row[2]) if row else None

    def has_counted(self, device: str, round_number: int) -> bool:
        """Say whether an update that a device trained for a round counts, or a late one in it.

        One that counts in a buffered round takes no other's place there.
        """
        trained = "SELECT upload FROM uploads WHERE device = ? AND round = ? AND state = 'counted'"
        late = "SELECT upload FROM late WHERE device = ? AND round = ?"
        which = (device, round_number) * 2
        return self._db.one(f"{trained} UNION ALL {late}", *which) is not None

    def expect(self, manifest: UploadManifest) -> None:
        """Begin an upload, or begin it again when the device now offers other bytes.

        A device has one upload open: what it left of others is forgotten.
        """
        known = self.known(manifest.upload)
        if known is not None and known.manifest == manifest:
            return
        with self._db.transaction():
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
        with self._db.transaction():
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
        with self._on_disk():
            data = self._parts.file(manifest).read_bytes()
        check_file(data, manifest.file.bytes, manifest.file.sha256)
        return data

    def count(
        self, manifest: UploadManifest, *, late_for: int | None = None, buffered: bool = False
    ) -> None:
        """Keep a verified update and count it to its round: once, whatever happens.

        One that comes too late for its round counts in the round `late_for`: as the only one of its
        device, or among others of it where that is `buffered`.
        """
        with self._db.transaction():
            if late_for is not None and buffered:
                self._db.run("INSERT INTO buffered VALUES (?, ?)", manifest.upload, late_for)
            elif late_for is not None:
                late = manifest.upload, manifest.device, late_for
                self._db.run("INSERT INTO late VALUES (?, ?, ?)", *late)
            self._parts.keep(manifest, self.file(manifest))
            self._settle(manifest, "counted", "")
            self._history.counted(manifest, late_for or manifest.round, time.time())
            if self._answered is not None:
                answers = self._answered[1]
                if answers.number == (manifest.round if late_for is None else late_for):
                    answers.add(manifest)

    def reject(self, manifest: UploadManifest, reason: str) -> None:
        """Refuse an upload; of those of a device that were refused the last is remembered."""
        with self._db.transaction():
            before = "device = ? AND upload != ? AND state = 'rejected'"
            self._forget(before, manifest.device, manifest.upload)
            self.expect(manifest)
            self._settle(manifest, "rejected", reason)
            self._history.refused(manifest.device, reason, time.time())
            self.forget_answers()

    def forget(self, manifest: UploadManifest) -> None:
        """Forget an upload that does not count, and what of it has come."""
        with self._db.transaction():
            self._forget("upload = ? AND state != 'counted'", manifest.upload)

    def _settle(self, manifest: UploadManifest, state: str, reason: str) -> None:
        with self._db.transaction():
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

    def finish_keeping(self) -> None:
        """Give those updates their names that were counted just before a crash."""
        with self._db.transaction():
            for manifest in self._needed():
                self._parts.keep(manifest, self.file(manifest))

    @property
    def parts_folder(self) -> Path:
        return self._parts.folder

    def needed_parts(self) -> set[Path]:
        """Return the files of uploads that are not whole yet."""
        rows = self._db.rows("SELECT manifest FROM uploads WHERE state = 'receiving'")
        return {self._parts.file(_manifest(row[0])) for row in rows}

    def file(self, manifest: UploadManifest) -> Path:
        """Return where an update is kept: under the hash of its content."""
        return self.folder / f"{manifest.file.sha256}.safetensors"

    def needed_files(self) -> set[Path]:
        """Return the files of updates that count in the last merged round, or in a later one."""
        return {self.file(manifest) for manifest in self._needed()}

    def _needed(self) -> list[UploadManifest]:
        merged = "(SELECT coalesce(max(number), 0) FROM rounds)"
        query = f"""SELECT manifest FROM uploads WHERE state = 'counted' AND (round >= {merged} OR
          upload IN (SELECT upload FROM behind WHERE round >= {merged}))"""
        return [_manifest(row[0]) for row in self._db.rows(query)]

    def of_round(self, round_number: int, *states: str) -> list[UploadManifest]:
        """Return the uploads of a round in these states, in the order of their devices' names.

        What came late is of the round in which it counts.
        """
        marks = ", ".join("?" * len(states))
        query = f"""SELECT manifest FROM uploads WHERE state IN ({marks})
          AND (round = ? AND upload NOT IN (SELECT upload FROM behind)
            OR upload IN (SELECT upload FROM behind WHERE round = ?)) ORDER BY device, round"""
        rows = self._db.rows(query, *states, round_number, round_number)
        return [_manifest(row[0]) for row in rows]

    def forget_unfinished(self, until: int) -> None:
        """Forget the uploads of rounds up to this one that are not whole."""
        self._forget("state = 'receiving' AND round <= ?", until)

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
