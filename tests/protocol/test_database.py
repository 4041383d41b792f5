"""A database: transactions in one another, what goes with a commit, and what the disk refuses."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest

from protocol.database import Database, DatabaseDamaged, DatabaseRefused
from tests.faults.small_disk import MIB, fill, mounted

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, line TEXT) STRICT;"
ADD = "INSERT INTO notes VALUES (?, ?)"


class Told(Exception):
    """What a guard says."""


@contextmanager
def guard() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Told(str(error)) from None


def names(database: Database) -> list[str]:
    return [row[0] for row in database.rows("SELECT name FROM notes ORDER BY name")]


def fail(database: Database) -> None:
    with database.transaction():
        with database.transaction():
            database.run(ADD, "gone", "")
        raise KeyError


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "new" / "notes.sqlite", SCHEMA, guard)) as made:
        yield made


def test_rows_are_there_after_reopening(database: Database, tmp_path: Path) -> None:
    assert database.run(ADD, "one", "first") == 1
    assert database.run("UPDATE notes SET line = 'x' WHERE name = ?", "two") == 0
    database.close()
    with closing(Database(tmp_path / "new" / "notes.sqlite", SCHEMA, guard)) as again:
        assert again.one("SELECT line FROM notes WHERE name = ?", "one") == ("first",)
        assert again.one("SELECT line FROM notes WHERE name = ?", "two") is None
        assert again.rows("PRAGMA journal_mode") == [("wal",)]
        assert again.rows("PRAGMA synchronous") == [(2,)], "FULL"


def test_a_transaction_is_kept_whole_or_not_at_all(database: Database) -> None:
    with database.transaction():
        database.run(ADD, "one", "")
        database.run(ADD, "two", "")
    with pytest.raises(KeyError):
        fail(database)
    assert names(database) == ["one", "two"]
    with database.transaction():
        database.run(ADD, "three", "")
    assert names(database) == ["one", "three", "two"]


def test_a_transaction_inside_another_is_a_part_of_it(database: Database, tmp_path: Path) -> None:
    with closing(Database(tmp_path / "new" / "notes.sqlite", SCHEMA, guard)) as other:
        with database.transaction():
            with database.transaction():
                database.run(ADD, "one", "")
            assert names(other) == [], "not committed with the inner one"
        assert names(other) == ["one"]
    with pytest.raises(KeyError):
        fail(database)
    assert names(database) == ["one"]


def test_hooks_are_called_around_the_commit_of_the_outermost_transaction(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    seen: list[tuple[str, list[str]]] = []
    other = Database(path, SCHEMA, guard)
    database = Database(
        path,
        SCHEMA,
        guard,
        before_commit=lambda: seen.append(("before", names(other))),
        after_commit=lambda: seen.append(("after", names(other))),
    )
    with closing(other), closing(database):
        with database.transaction(), database.transaction():
            database.run(ADD, "one", "")
        assert seen == [("before", []), ("after", ["one"])]
        with pytest.raises(KeyError):
            fail(database)
        assert len(seen) == 2, "a rollback calls none"


def test_what_a_hook_before_the_commit_is_refused_keeps_the_rows_out(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    path = tmp_path / "notes.sqlite"
    with closing(Database(path, SCHEMA, guard, before_commit=refuse)) as database:
        with pytest.raises(Told, match="the disk is gone"), database.transaction():
            database.run(ADD, "one", "")
        assert names(database) == []


def test_no_room_is_told_and_leaves_the_database_in_order(database: Database) -> None:
    (pages,) = database.one("PRAGMA page_count") or (0,)
    database.run(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Told, match="full"), database.transaction():
        database.run(ADD, "one", "x" * 100_000)
    assert names(database) == []
    database.run(ADD, "two", "")
    database._guard = nullcontext
    with pytest.raises(DatabaseRefused) as raised:
        database.run(ADD, "one", "x" * 100_000)
    assert raised.value.errno == errno.ENOSPC


def test_a_database_in_use_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    one, other = (Database(path, SCHEMA, guard, busy_s=0.0) for _ in range(2))
    with closing(one), closing(other), one.transaction(), pytest.raises(Told, match="locked"):
        other.run(ADD, "one", "")


def test_a_damaged_file_is_told_on_opening_and_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(DatabaseDamaged, match=r"^file is not a database$"):
        Database(path, SCHEMA, guard)
    path.unlink()
    with closing(Database(path, SCHEMA, guard)) as database:
        for number in range(30):
            database.run(ADD, str(number), "x" * 9000)
    good = path.read_bytes()
    path.write_bytes(good[:8192] + b"?" * 60_000 + good[68_192:])
    with closing(Database(path, SCHEMA, guard)) as database, pytest.raises(Told, match="malformed"):
        database.rows("SELECT line FROM notes")


def test_a_path_that_cannot_be_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Database(tmp_path / "file" / "notes.sqlite", SCHEMA, guard)
    with pytest.raises(DatabaseRefused, match="unable to open"):
        Database(tmp_path, SCHEMA, guard)


def test_a_mistake_in_the_code_stays_one(database: Database) -> None:
    database.run(ADD, "one", "")
    with pytest.raises(sqlite3.IntegrityError):
        database.run(ADD, "one", "")
    with pytest.raises(sqlite3.ProgrammingError):
        database.run(ADD, "one")


def test_a_disk_that_was_full_before_it_is_opened_is_called_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", MIB // 2) as why:
        if why:
            pytest.skip(why)
        path = tmp_path / "disk" / "notes.sqlite"
        Database(path, SCHEMA, nullcontext).close()
        ballast = fill(path.parent)
        with pytest.raises(DatabaseRefused, match="the disk is full") as caught:
            Database(path, SCHEMA, nullcontext)
        assert caught.value.errno == errno.ENOSPC
        ballast.unlink()
        Database(path, SCHEMA, nullcontext).close()
