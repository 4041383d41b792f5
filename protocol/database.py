"""SQLite as devices and the aggregator use it: what is committed is on the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Guard = Callable[[], AbstractContextManager[None]]


def _nothing() -> None:
    return None


class Database:
    """Open a database, making it if need be: write-ahead log, synchronous FULL, one thread.

    `guard` makes the context in which every statement runs: it turns what the disk refuses
    (sqlite3.Error, OSError) into words. `before_commit` and `after_commit` belong to files that
    change with the rows.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        guard: Guard,
        *,
        busy_s: float = 5.0,
        before_commit: Callable[[], None] = _nothing,
        after_commit: Callable[[], None] = _nothing,
    ) -> None:
        self._guard = guard
        self._before_commit, self._after_commit = before_commit, after_commit
        with guard():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=busy_s)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(schema)

    def close(self) -> None:
        self._db.close()

    def run(self, statement: str, *values: object) -> int:
        """Execute a statement that changes rows, in the transaction around it or one of its own.

        Returns the number of rows that it changed.
        """
        with self._guard():
            return self._db.execute(statement, values).rowcount

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self._guard():
            return self._db.execute(query, values).fetchall()

    def one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """Return the first row of a query; None if there is none."""
        return next(iter(self.rows(query, *values)), None)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does as one, or none of it; inside another it is a part of that."""
        if self._db.in_transaction:
            yield
            return
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._before_commit()
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk can have ended it
                    self._db.execute("ROLLBACK")
                raise
            self._after_commit()
