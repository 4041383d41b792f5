"""Read a device's own text from files and folders; what can't be read is named and left out."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client.data.example import (
    ACCEPTED,
    FIELDS,
    BadRow,
    Example,
    counted,
    example_of_row,
    parse_json,
)
from edge_client.errors import DataError
from protocol.extras import how_to_install


@dataclass(frozen=True, slots=True)
class Problem:
    """Name a row that was left out: its file, its line from 1 (0: all of the file), and why."""

    file: Path
    line: int
    why: str

    def __str__(self) -> str:
        """Return it as a person reads it, say "notes.jsonl:3: 'text' is empty"."""
        place = f"{self.file}:{self.line}" if self.line else f"{self.file}"
        return f"{place}: {self.why}"


@dataclass(frozen=True, slots=True)
class Reading:
    """Hold the examples that were read, and the rows and files that were left out."""

    examples: list[Example]
    problems: list[Problem]


def read_examples(paths: Sequence[Path], progress: Callable[[], object] = lambda: None) -> Reading:
    """Read the files named, and those in the folders named, each once.

    A folder is read with its subfolders, in the order of the names; hidden files, and files of a
    kind that isn't read, are passed over in it. A file that this user may not read, or that has
    gone since its folder was looked into, is left out. `progress` is called after each file.

    Raises:
        DataError: a path is missing, a file named is of a kind that isn't read, pyarrow is wanting
            for a .parquet file, or there is no example in any of them.
    """
    reading = Reading([], [])
    for file in _files(paths, reading.problems):
        try:
            for found in _READERS[file.suffix.lower()](file):
                if isinstance(found, Example):
                    reading.examples.append(found)
                else:
                    reading.problems.append(found)
        except OSError as error:
            reading.problems.append(_unreadable(file, error))
        progress()
    if not reading.examples:
        raise DataError(_nothing_in(paths, reading.problems))
    return reading


def check_paths(paths: Sequence[Path]) -> None:
    """Look whether there is something to read at all, without reading it.

    Raises:
        DataError: a path is missing, a file named is of a kind that isn't read, or there is no
            file that can be read, or no byte in any.
    """
    sizes: list[int] = []
    problems: list[Problem] = []
    for file in _files(paths, problems):
        try:
            with file.open("rb") as stream:
                sizes.append(len(stream.read(1)))
        except OSError as error:
            problems.append(_unreadable(file, error))
    if not any(sizes):
        if problems:
            raise DataError(_nothing_in(paths, problems))
        where = ", ".join(map(str, paths))
        bad = "each of its files is empty" if sizes else "no file of a kind that is read"
        raise DataError(f"nothing to learn from in {where} ({bad}); what is read: {ACCEPTED}")


def _nothing_in(paths: Sequence[Path], problems: Sequence[Problem]) -> str:
    """Return the message for paths that hold no example."""
    where = ", ".join(map(str, paths)) or "no path at all"
    bad = "no rows at all"
    if problems:
        first = f"the first {problems[0]}" if len(problems) > 1 else f"{problems[0]}"
        files = sum(problem.line == 0 for problem in problems)
        kinds = {"bad row": len(problems) - files, "unreadable path": files}
        bad = " and ".join(counted(number, kind) for kind, number in kinds.items() if number)
        bad = f"{bad}, {first}"
    return f"nothing to learn from in {where} ({bad}); what is read: {ACCEPTED}"


def _unreadable(path: Path | str, error: OSError) -> Problem:
    why = error.strerror or error
    return Problem(Path(path), 0, f"cannot read it ({why}); check its permissions")


def _files(paths: Sequence[Path], problems: list[Problem]) -> list[Path]:
    """Return the files to read, each once though two paths lead to it; name what can't be seen."""
    files: dict[Path, Path] = {}
    for path in paths:
        try:
            for file in _files_at(path, problems):
                files.setdefault(file.resolve(), file)
        except OSError as error:  # a folder on the way that this user may not look into
            problems.append(_unreadable(error.filename or path, error))
    return list(files.values())


def _files_at(path: Path, problems: list[Problem]) -> list[Path]:
    """Return the file that a path is, or those below it."""
    if path.is_dir():
        return _files_below(path, problems)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; check the path")
    if path.suffix.lower() not in _READERS:
        kind = f"{path.suffix} files" if path.suffix else "files with no ending"
        raise DataError(f"cannot read {path}: {kind} are not read; what is read: {ACCEPTED}")
    return [path]


def _files_below(folder: Path, problems: list[Problem]) -> list[Path]:
    """Return the readable kinds of file in a folder and its subfolders, in order of name."""

    def leave_out(error: OSError) -> None:
        problems.append(_unreadable(error.filename, error))

    files = []
    for root, folders, names in os.walk(folder, onerror=leave_out):
        folders[:] = [each for each in folders if not each.startswith(".")]
        files += [Path(root, each) for each in names if not each.startswith(".")]
    return sorted(f for f in files if f.suffix.lower() in _READERS and _is_file(f, problems))


def _is_file(path: Path, problems: list[Problem]) -> bool:
    """Say whether something in a folder is a file, or a link to one."""
    try:
        return path.is_file()
    except OSError as error:  # a link to where this user may not look
        problems.append(_unreadable(path, error))
        return False


def _from_row(row: object, file: Path, line: int) -> Example | Problem:
    """Return the row's example, or what is wrong with it."""
    try:
        return example_of_row(row, file, line)
    except BadRow as bad:
        return Problem(file, line, str(bad))


def _read_document(file: Path) -> Iterator[Example | Problem]:
    """Read a file that is one text."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem(file, raw.count(b"\n", 0, error.start) + 1, "not valid UTF-8")
        return
    if "\0" in text:
        yield Problem(file, text[: text.index("\0")].count("\n") + 1, "a NUL: not a text file")
    else:
        yield _from_row({"text": text.replace("\r\n", "\n")}, file, 1)


def _read_jsonl(file: Path) -> Iterator[Example | Problem]:
    """Read a file with a JSON object on each line; empty lines are passed over."""
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                row = parse_json(raw.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield Problem(file, line, "not valid UTF-8")
            except BadRow as bad:
                yield Problem(file, line, str(bad))
            else:
                yield _from_row(row, file, line)


class _CsvLines:
    """Feed lines to csv.reader, knowing where a row began and whether a quote is open.

    csv.reader forgets that a quote is open when it refuses a row, and would read the rest of that
    field as rows. The count of quotes since the row's start tells: it's odd within a field, as a
    quote inside one is doubled.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._read = 0
        self._quotes = 0
        self.row_line = 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._read += 1
        self._quotes += line.count('"')
        return line

    def begin_row(self) -> None:
        """Note that the next line begins a row."""
        self.row_line = self._read + 1
        self._quotes = 0

    def skip_row(self) -> None:
        """Go past the lines that belong to the same row."""
        while self._quotes % 2 and next(self, None) is not None:
            pass


def _csv_rows(lines: _CsvLines) -> Iterator[list[str] | BadRow]:
    """Yield each row of a .csv file, or why it can't be read; empty lines are passed over."""
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.skip_row()
            yield BadRow(f"not a row of csv: {error}")
        else:
            if row:
                yield row


def _read_csv(file: Path) -> Iterator[Example | Problem]:
    """Read a file of comma-separated values whose first line names the columns."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines = _CsvLines(stream)
        rows = _csv_rows(lines)
        header = next(rows, [])
        if isinstance(header, BadRow) or not _has_fields(header):
            yield Problem(file, lines.row_line, f"the first line names none of {_columns()}")
            return
        for row in rows:
            if isinstance(row, BadRow):
                yield Problem(file, lines.row_line, str(row))
            elif len(row) != len(header):
                columns = counted(len(header), "column")
                why = f"{counted(len(row), 'value')} under {columns}"
                yield Problem(file, lines.row_line, why)
            else:
                # An empty cell is an absent field, so that one file may hold rows of each kind.
                filled = {n: v for n, v in zip(header, row, strict=True) if v.strip()}
                yield _from_row(filled, file, lines.row_line)


def _read_parquet(file: Path) -> Iterator[Example | Problem]:
    """Read a .parquet file a thousand rows at a time; its lines are row numbers from 1."""
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]  # may ship no types
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"reading {file} needs pyarrow, which is not installed; {how_to_install('parquet')}"
        ) from error
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = [name for name in table.schema_arrow.names if name in FIELDS]
            if not _has_fields(names):
                yield Problem(file, 1, f"it has none of {_columns()}")
                return
            for batch in table.iter_batches(batch_size=1000, columns=names):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for index in range(batch.num_rows):
                    row += 1
                    try:
                        values = {name: column[index].as_py() for name, column in columns.items()}
                    except ValueError:
                        yield Problem(file, row, "not valid UTF-8")
                    else:
                        yield _from_row(values, file, row)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk or its permissions; Arrow's own complaints carry no number
        yield Problem(file, row + 1, f"not parquet that can be read: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _has_fields(columns: Sequence[str]) -> bool:
    """Tell whether some kind of row can be made of these columns."""
    names = set(columns)
    return bool(names & {"text", "messages"}) or {"prompt", "completion"} <= names


def _columns() -> str:
    return "the columns 'text', 'messages', 'prompt' with 'completion'"


_READERS: dict[str, Callable[[Path], Iterator[Example | Problem]]] = {
    ".txt": _read_document,
    ".md": _read_document,
    ".py": _read_document,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
