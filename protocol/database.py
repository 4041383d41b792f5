"""SQLite as devices and the aggregator use it: what is committed is on the disk."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from protocol.files import PRIVATE

NO_ROOM_BYTES = 256 * 1024
"""With less than this SQLite may fail in other words than that the disk is full."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write is refused with where there is no room."""
Guard = Callable[[], AbstractContextManager[None]]


class DatabaseRefused(OSError):
    """A database can't be used: no room (ENOSPC), locked, not writable, damaged; says which."""

    def __str__(self) -> str:
        return str(self.strerror)


class DatabaseDamaged(DatabaseRefused):
    """A file is not a database, or not a whole one."""


def _nothing() -> None:
    return None


class Database:
    """Open a database, making it if need be: write-ahead log, synchronous FULL, one thread.

    Its owner alone may read it, whatever the folder's mode and the umask.

    `guard` makes the context in which every statement and transaction runs, once it is open: it
    turns what the disk refuses (OSError) into words. `before_commit` and `after_commit` belong to
    files that change with the rows. One `in_memory` touches no disk and is gone when closed.

    Raises:
        OSError: the folder can't be made, or the database can't be opened (DatabaseRefused).
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
        after_rollback: Callable[[], None] = _nothing,
        in_memory: bool = False,
    ) -> None:
        self._guard = guard
        self._before_commit, self._after_commit = before_commit, after_commit
        self._after_rollback = after_rollback
        self._folder = path.parent
        if in_memory:
            self._db = sqlite3.connect(":memory:", isolation_level=None)
            self._db.executescript(schema)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _refusals(self._folder):
            _make_private(path)
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
        with self._guard(), _refusals(self._folder):
            return self._db.execute(statement, values).rowcount

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self._guard(), _refusals(self._folder):
            return self._db.execute(query, values).fetchall()

    def one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """Return the first row of a query; None if there is none."""
        return next(iter(self.rows(query, *values)), None)

    def others_commits(self) -> int:
        """Return a number that is another one once another connection has committed something."""
        row = self.one("PRAGMA data_version")
        assert row is not None, "it has one row always"
        return int(row[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does as one, or none of it; inside another it is a part of that."""
        if self._db.in_transaction:
            yield
            return
        with self._guard(), _refusals(self._folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._before_commit()
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk can have ended it
                    self._db.execute("ROLLBACK")
                self._after_rollback()
                raise
            self._after_commit()


def _make_private(path: Path) -> None:
    """Make a database, and what SQLite has left beside it, readable by its owner alone."""
    path.touch(PRIVATE)
    for part in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        with suppress(PermissionError):  # another's, who lets this user write it
            if part.is_file():
                part.chmod(PRIVATE)


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Raise what the disk is to blame for as DatabaseRefused; sqlite3's other errors are bugs."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or ("locked" not in str(error) and _is_full(folder)):
            raise DatabaseRefused(errno.ENOSPC, "the disk is full") from None
        raise DatabaseRefused(errno.EIO, str(error)) from None
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # its subclasses are other things than damage
            raise
        raise DatabaseDamaged(errno.EIO, str(error)) from None


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < NO_ROOM_BYTES
    except OSError:
        return False
