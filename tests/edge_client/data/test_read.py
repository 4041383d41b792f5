"""Check that every accepted form is read, and that what is bad is named and never raised."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_client.data.example import Completion, Turn
from edge_client.data.read import Reading, check_paths, read_examples
from edge_client.errors import DataError

SHARED_FOLDER = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def written(file: Path, content: str | bytes) -> Path:
    """Write a file, its folder too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def places(reading: Reading) -> list[tuple[str, int]]:
    """Return the file name and line of each problem."""
    return [(problem.file.name, problem.line) for problem in reading.problems]


def texts(reading: Reading) -> list[object]:
    """Return the payloads."""
    return [example.payload for example in reading.examples]


def test_each_kind_of_row_is_read_from_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": "plain", "other": 3},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "p", "completion": "c", "text": None},
    ]
    file = written(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    reading = read_examples([file])
    assert texts(reading) == ["plain", (Turn("user", "q"), Turn("assistant", "a")), ("p", "c")]
    assert [e.kind for e in reading.examples] == ["text", "messages", "completion"]
    assert isinstance(reading.examples[2].payload, Completion)
    assert [e.line for e in reading.examples] == [1, 3, 5]
    assert reading.examples[0].source == file
    assert reading.problems == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "a value of type int" if sys.version_info < (3, 10, 7) else "not JSON"),
        ('["a"]', "not a list"),
        ("{}", "neither 'text'"),
        ('{"prompt": "p"}', "neither 'text'"),
        ('{"text": 5}', "type int, not a string"),
        ('{"text": " \\n"}', "'text' is empty"),
        ('{"text": "\\ud800"}', "not valid UTF-8"),
        ('{"prompt": "p", "completion": ""}', "'completion' is empty"),
        ('{"messages": 1}', "'messages' is"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', "'content' is null"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "'role' is"),
        ('{"messages": "[not"}', "'messages' is a string, not a list"),
        ('{"messages": "oops"}', "'messages' is a string, not a list"),
    ],
)
def test_a_bad_row_is_named_and_its_neighbours_are_read(tmp_path: Path, row: str, why: str) -> None:
    file = written(tmp_path / "a.jsonl", '{"text": "one"}\n' + row + '\n{"text": "two"}\n')
    reading = read_examples([file])
    assert texts(reading) == ["one", "two"]
    assert places(reading) == [("a.jsonl", 2)]
    assert why in reading.problems[0].why
    assert str(reading.problems[0]).startswith(f"{file}:2: ")


def test_a_line_of_bad_utf8_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "\xff"}\n')
    reading = read_examples([file])
    assert texts(reading) == ["one"]
    assert places(reading) == [("a.jsonl", 2)]


def test_a_document_is_one_example_and_bad_ones_are_named(tmp_path: Path) -> None:
    written(tmp_path / "good.md", "# A\r\n\r\ntext")
    written(tmp_path / "latin.txt", "a\nb\n\xe9".encode("latin-1"))
    written(tmp_path / "nul.txt", "a\n\0b")
    written(tmp_path / "empty.py", "\n")
    reading = read_examples([tmp_path])
    assert texts(reading) == ["# A\n\ntext"]
    assert places(reading) == [("empty.py", 1), ("latin.txt", 3), ("nul.txt", 2)]


def test_a_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ["b/z.txt", "a.TXT", "b/a.py", ".hidden.txt", ".git/c.txt", "image.png"]:
        written(tmp_path / name, name)
    assert texts(read_examples([tmp_path])) == ["a.TXT", "b/a.py", "b/z.txt"]


def test_a_file_reached_twice_is_read_once(tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", "text")
    assert len(read_examples([file, tmp_path, tmp_path / "." / "a.txt"]).examples) == 1


def test_csv_with_each_kind_of_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    with file.open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["id", "text", "prompt", "completion", "messages"])
        out.writerow(["1", 'two\nlines, "quoted"', "", "", ""])
        out.writerow(["2", "", "p", "c", ""])
        out.writerow(["3", "", "", "", '[{"role": "user", "content": "q"}]'])
        out.writerow(["4", "", "", "", ""])
        out.writerow(["5", "too short"])
    reading = read_examples([file])
    assert texts(reading) == ['two\nlines, "quoted"', ("p", "c"), (Turn("user", "q"),)]
    assert [e.line for e in reading.examples] == [2, 4, 5]
    assert places(reading) == [("a.csv", 6), ("a.csv", 7)]


def test_an_oversized_csv_field_is_left_out_whole(tmp_path: Path) -> None:
    large = "one line of a large field\n" * 10_000
    file = written(tmp_path / "a.csv", f'text\nbefore\n"{large}"\nafter\n"{"x" * 200_000}"\nend\n')
    reading = read_examples([file])
    assert texts(reading) == ["before", "after", "end"]
    assert places(reading) == [("a.csv", 3), ("a.csv", 10_005)]
    assert "field larger than" in reading.problems[0].why


def test_a_csv_quote_never_closed_is_named_where_it_opens(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", 'text\none\n"open\ntwo\n')
    reading = read_examples([file])
    assert texts(reading) == ["one"]
    assert places(reading) == [("a.csv", 3)]


def test_a_csv_row_of_bad_utf8_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", b"\xef\xbb\xbftext\nbad \xff\ngood\n")
    reading = read_examples([file])
    assert texts(reading) == ["good"]
    assert places(reading) == [("a.csv", 2)]


@pytest.mark.parametrize("content", ["", "id,name\n1,a\n", "prompt\nx\n"])
def test_a_csv_without_the_columns_is_named(tmp_path: Path, content: str) -> None:
    written(tmp_path / "a.csv", content)
    written(tmp_path / "b.txt", "text")
    assert places(read_examples([tmp_path])) == [("a.csv", 1)]


def write_parquet(file: Path, **columns: Sequence[object]) -> Path:
    """Write a .parquet file of these columns."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}]
    write_parquet(
        tmp_path / "a.parquet",
        text=["one", None, "", None],
        messages=[None, turns, None, None],
        n=[1, 2, 3, 4],
    )
    reading = read_examples([tmp_path])
    assert texts(reading) == ["one", (Turn("user", "q"),)]
    assert [e.line for e in reading.examples] == [1, 2]
    assert places(reading) == [("a.parquet", 3), ("a.parquet", 4)]


def test_parquet_that_is_broken_or_has_other_columns_is_named(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", text=["one"] * 100).read_bytes()
    written(tmp_path / "b.parquet", whole[:-20])
    written(tmp_path / "c.parquet", b"no parquet")
    write_parquet(tmp_path / "d.parquet", n=[1])
    reading = read_examples([tmp_path])
    assert len(reading.examples) == 100
    assert places(reading) == [("b.parquet", 1), ("c.parquet", 1), ("d.parquet", 1)]


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"clone .*: pip install '\.\[parquet\]' -c "):
        read_examples([tmp_path])


def test_nothing_to_learn_names_paths_count_and_first_problem(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "{}\n{}\n")
    with pytest.raises(DataError) as caught:
        read_examples([tmp_path])
    said = str(caught.value)
    assert str(tmp_path) in said and "2 bad rows" in said and "a.jsonl:1:" in said
    assert ".parquet" in said
    written(tmp_path / "a.jsonl", "{}\n")
    with pytest.raises(DataError, match=r"\(1 bad row, .*a\.jsonl:1:"):
        read_examples([tmp_path])


def test_a_missing_path_an_unknown_ending_and_no_path_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read_examples([tmp_path / "none"])
    with pytest.raises(DataError, match=r"\.png files are not read; what is read: \.txt"):
        read_examples([written(tmp_path / "a.png", "x")])
    with pytest.raises(DataError, match="nothing to learn"):
        read_examples([])


def test_a_glance_tells_whether_there_is_something_to_read(tmp_path: Path) -> None:
    for name, why in (("a.png", r"\.png files are not"), ("Makefile", "files with no ending are")):
        with pytest.raises(DataError, match=why):
            check_paths([written(tmp_path / "other" / name, "x")])
    with pytest.raises(DataError, match=r"in .*other \(no file of a kind that is read\)"):
        check_paths([tmp_path / "other"])
    with pytest.raises(DataError, match="no file or folder"):
        check_paths([tmp_path / "none"])
    written(tmp_path / "text" / "empty.txt", "")
    with pytest.raises(DataError, match=r"\(each of its files is empty\)"):
        check_paths([tmp_path / "text"])
    written(tmp_path / "text" / "full.txt", "x")
    check_paths([tmp_path / "text"])


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read every file")
def test_nothing_but_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "x").chmod(0)
    with pytest.raises(DataError, match="cannot read"):
        read_examples([tmp_path])


def test_nothing_but_a_disk_error_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    written(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="Input/output error"):
        read_examples([tmp_path])


def test_what_goes_while_a_folder_is_read_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.jsonl"):
        written(tmp_path / name, '{"text": "one"}')
    reading = read_examples([tmp_path], lambda: (tmp_path / "b.txt").unlink(missing_ok=True))
    assert [example.source.name for example in reading.examples] == ["a.txt", "c.txt", "d.jsonl"]
    (problem,) = reading.problems
    assert str(problem).startswith(f"{tmp_path / 'b.txt'}: cannot read it (No such file")


def test_what_this_user_may_not_read_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "theirs.txt", "x")
    written(tmp_path / "more" / "mine.txt", "y")
    open_file = Path.open

    def refuse(path: Path, *more: Any, **named: Any) -> Any:
        if path.name == "theirs.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *more, **named)

    def read_bytes(path: Path) -> bytes:
        with refuse(path, "rb") as file:
            return bytes(file.read())

    monkeypatch.setattr(Path, "open", refuse)  # root, who may run this, may read all
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    for look in (check_paths, read_examples):
        with pytest.raises(DataError, match=r"1 unreadable path, .*theirs\.txt: .* denied"):
            look([tmp_path / "theirs.txt"])
    check_paths([tmp_path])
    reading = read_examples([tmp_path])
    assert (texts(reading), places(reading)) == (["y"], [("theirs.txt", 0)])


@SHARED_FOLDER
@given(content=st.binary(max_size=300), ending=st.sampled_from(["txt", "jsonl", "csv", "parquet"]))
def test_no_bytes_at_all_make_it_raise(tmp_path: Path, content: bytes, ending: str) -> None:
    file = written(tmp_path / f"any.{ending}", content)
    good = written(tmp_path / "good.md", "text")
    reading = read_examples([file, good])
    assert reading.examples[-1].payload == "text"


@SHARED_FOLDER
@given(
    rows=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
        .filter(str.strip)
        .map(lambda text: text.replace("\r", "\n")),
        min_size=1,
        max_size=8,
    )
)
def test_csv_and_jsonl_give_back_what_was_written(tmp_path: Path, rows: list[str]) -> None:
    rows = [row for row in rows if row.strip()] or ["x"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["text"], *([row] for row in rows)])
    lines = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    written(tmp_path / "b.jsonl", lines)
    assert texts(read_examples([tmp_path / "a.csv"])) == rows
    assert texts(read_examples([tmp_path / "b.jsonl"])) == rows
