"""A store's database, read beside the daemon that writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aggregator.errors import StoreError

FILE = "store.sqlite"
REGISTRY = "devices.sqlite"
BUSY_S = 5.0
TABLES = ("counted", "refused", "times", "heard", "band_sizes", "commands")
"""What stores have had since there are views of them."""


class ReadOnly:
    """Open it: nothing can be written by this connection; one thread at a time may use it.

    A fleet's registry, where it is beside the state folder, is there as `fleet`.

    Raises:
        StoreError: there is none, it can't be read, or it is of an earlier version of the program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / FILE
        if not path.is_file():
            raise StoreError(
                f"there is no aggregator's state in {folder}; `aggregator serve` makes one, and "
                "--state, --dir or -c names where"
            )
        try:
            self._db = sqlite3.connect(
                _uri(path),
                uri=True,
                isolation_level=None,
                timeout=BUSY_S,
                check_same_thread=False,
            )
            registry = folder.parent / REGISTRY
            self.has_registry = registry.is_file()
            if self.has_registry:
                self._db.execute("ATTACH DATABASE ? AS fleet", [_uri(registry)])
            names = {name for (name,) in self._db.execute("SELECT name FROM main.sqlite_master")}
        except sqlite3.Error as error:
            raise StoreError(f"can't read the aggregator's state in {folder}: {error}") from None
        if missing := [table for table in TABLES if table not in names]:
            self._db.close()
            raise StoreError(
                f"the state in {folder} is an earlier version's: it has no table {missing[0]}; "
                "serve it once with this version"
            )

    def close(self) -> None:
        self._db.close()

    def stamp(self) -> tuple[int, int]:
        """Return what is something else once somebody else has written here."""
        own = int(self.one("PRAGMA main.data_version")[0])
        return own, int(self.one("PRAGMA fleet.data_version")[0]) if self.has_registry else 0

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Have all queries in the block see the same moment."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def rows(self, query: str, values: Sequence[object] | dict[str, object] = ()) -> list[Any]:
        """Return all rows of a query.

        Raises:
            StoreError: the database is damaged, or busy for too long.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"can't read the aggregator's state in {self.folder}: {error}"
            ) from None

    def one(self, query: str, values: Sequence[object] | dict[str, object] = ()) -> Any:
        """Return the first row of a query; None if there is none."""
        return next(iter(self.rows(query, values)), None)


def _uri(path: Path) -> str:
    return f"file:{quote(str(path.absolute()))}?mode=ro"
