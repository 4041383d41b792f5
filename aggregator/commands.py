"""The table of commands: who asks writes a row, the daemon answers it, with the effect or not.

waiting ──daemon──▶ done | refused        waiting ──who asked──▶ withdrawn
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aggregator.errors import StoreError
from protocol.database import Database

STORE_FILE, FLEET_FILE = "store.sqlite", "daemon.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS commands (
  key TEXT PRIMARY KEY, command TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL,
  expires REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('waiting', 'done', 'refused', 'withdrawn')),
  code TEXT NOT NULL DEFAULT '', said TEXT NOT NULL DEFAULT '', fields TEXT NOT NULL DEFAULT '{}',
  ended REAL) STRICT;
CREATE INDEX IF NOT EXISTS commands_waiting ON commands (at) WHERE state = 'waiting';
"""
KEPT = 1000
"""Answered commands that are remembered, the newest."""
BUSY_S = 10.0


class Waiting(NamedTuple):
    """A command that nobody has answered yet."""

    key: str
    command: str
    by: str
    expires: float


class Told(NamedTuple):
    """How a command stands."""

    state: str
    code: str
    said: str
    fields: dict[str, Any]


class CommandTable:
    """Hold the commands in a database, whose transactions they are part of."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @classmethod
    def beside(cls, path: Path) -> CommandTable:
        """Open the table of a database that another thread or process writes too.

        Raises, as every method does then:
            StoreError: it can't be used.
        """

        @contextmanager
        def in_words() -> Iterator[None]:
            try:
                yield
            except OSError as error:
                why = error.strerror or str(error)
                raise StoreError(f"can't tell the aggregator by {path}: {why}") from None

        with in_words():
            return cls(Database(path, SCHEMA, in_words, busy_s=BUSY_S))

    def close(self) -> None:
        self._db.close()

    # -- who asks --------------------------------------------------------------------------------

    def put(self, key: str, command: str, by: str, *, at: float, expires: float) -> None:
        """Ask for something; asked with a key that is known, nothing is asked anew."""
        self._db.run(
            "INSERT OR IGNORE INTO commands (key, command, by, at, expires, state) "
            "VALUES (?, ?, ?, ?, ?, 'waiting')",
            key,
            command,
            by,
            at,
            expires,
        )

    def answer(self, key: str) -> Told:
        """Return how a command stands; one that is forgotten is withdrawn."""
        row = self._db.one("SELECT state, code, said, fields FROM commands WHERE key = ?", key)
        if row is None:
            return Told("withdrawn", "", "", {})
        return Told(row[0], row[1], row[2], json.loads(row[3]))

    def withdraw(self, key: str) -> None:
        """Take a command back, if nobody has answered it."""
        self._db.run(
            "UPDATE commands SET state = 'withdrawn' WHERE key = ? AND state = 'waiting'", key
        )

    # -- the daemon ------------------------------------------------------------------------------

    def waiting(self) -> list[Waiting]:
        """Return what is to be answered, in the order in which it was asked."""
        rows = self._db.rows(
            "SELECT key, command, by, expires FROM commands WHERE state = 'waiting' "
            "ORDER BY at, key"
        )
        return [Waiting(*row) for row in rows]

    def is_waiting(self, key: str) -> bool:
        """Say whether it still is, inside the transaction that answers it."""
        query = "SELECT 1 FROM commands WHERE key = ? AND state = 'waiting'"
        return self._db.one(query, key) is not None

    def settle(
        self, key: str, state: str, *, said: str, at: float, code: str = "", fields: str = "{}"
    ) -> None:
        """Answer a command, in the transaction of what it has changed."""
        with self._db.transaction():
            self._db.run(
                "UPDATE commands SET state = ?, code = ?, said = ?, fields = ?, ended = ? "
                "WHERE key = ? AND state = 'waiting'",
                state,
                code,
                said,
                fields,
                at,
                key,
            )
            self._db.run(
                "DELETE FROM commands WHERE state != 'waiting' AND key NOT IN "
                f"(SELECT key FROM commands ORDER BY at DESC LIMIT {KEPT})"
            )
