"""What `python -m benchmarks.quality` says of what it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main
from benchmarks.quality.arms import ARMS, DEFAULT


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
        ("anchored", "; did you mean 'anchored, rotating, by rank'?"),
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
    listed = [line for line in err.splitlines() if line.startswith("  '")]
    assert len(listed) == len(ARMS)
    assert f"  {DEFAULT!r}, the default of a job" in listed
