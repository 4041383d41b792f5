"""What `python -m benchmarks.quality` says of what it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main
from benchmarks.quality.arms import ARMS, DEFAULT, Result, Schedule
from benchmarks.quality.store import Case


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results where the test is."""
    monkeypatch.chdir(tmp_path)


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str, str]:
    """Return the exit code, and what was written to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", *arguments])
    code: int | str | None = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_a_folder_a_data_set_or_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "data" / "datasets" / "made"
    made.mkdir(parents=True)
    for name in ("train", "test"):
        rows = [{"text": f"{name} {d} {n}", "domain": d} for d in "abcd" for n in range(20)]
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for arguments, named in (
        (["--data", "nowhere"], "nowhere"),
        (["--data", "data", "--datasets", "other"], "other"),
        (["--data", "data", "--datasets", "made", "--models", "toy"], "models/toy"),
    ):
        code, _, err = said(monkeypatch, capsys, *arguments, "--quick")
        assert code == 1
        assert err.startswith("error: ") and named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("anchored", f"; did you mean {DEFAULT!r}?"),
        ("fedvag", "; did you mean 'fedavg'?"),
        ("trust-validation left split", "did you mean 'trust-validation, left split'?"),
        ("xyz", "there is no arm 'xyz'. There are"),
    ],
)
def test_an_arm_that_there_is_not(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(monkeypatch, capsys, "--data", "any", "--arms", name)
    assert code == 2 and meant in err
    listed = [line for line in err.splitlines() if line.startswith(("  '", '  "'))]
    assert len(listed) == len(ARMS)
    assert f"  {DEFAULT!r}, the default of a job" in listed


def test_a_report_of_nothing_says_what_was_looked_for_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ("--data", "any", "--datasets", "made", "--models", "toy", "--report")
    code, out, err = said(monkeypatch, capsys, *report, "--seeds", "3", "4", "--out", "docs")
    assert "made, toy: no results of any arm with 10 rounds and seeds 3, 4 in runs/bench/q" in err
    assert str(code).startswith("error: nothing to report") and out == ""
    assert not (tmp_path / "docs").exists()
    code, _, err = said(monkeypatch, capsys, *report, "--published", "docs")
    assert code == 1 and err.startswith("error: cannot read docs/runs.json: No such file")


def test_tables_do_not_lose_rows_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dataset, arm in (("one", "segment"), ("one", "flora"), ("two", "flora")):
        result = Result(3.0, 3.0, {"d0": 3.0}, [3.0], 1.0)
        Case(dataset, "toy", arm, 0, ARMS[arm].start, Schedule()).write(result)
    tables, report = tmp_path / "docs" / "tables.md", ("--data", "any", "--models", "toy")
    report = (*report, "--report", "--out", "docs", "--datasets", "one")
    assert said(monkeypatch, capsys, *report, "two")[0] == 0
    whole = tables.read_text()
    for fewer, lost in (
        ([], "flora (two, toy)"),
        (["two", "--arms", "flora"], "segment (one, toy)"),
    ):
        code, out, _ = said(monkeypatch, capsys, *report, *fewer)
        assert f"nothing was written to docs: its tables have what these lack, {lost};" in str(code)
        assert "flora" in out, "they are shown all the same"
        assert tables.read_text() == whole
    assert said(monkeypatch, capsys, *report, "--force")[0] == 0
    assert "one, toy" in tables.read_text() and "two, toy" not in tables.read_text()
