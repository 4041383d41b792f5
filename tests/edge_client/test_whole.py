"""A folder is put in its place whole, and whatever stops it nothing that was there is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.errors import ConfigError, StorageError
from edge_client.whole import put_whole


def is_ours(folder: Path) -> bool:
    return (folder / "ours").is_file()


def put(out: Path, text: str) -> None:
    with put_whole(out, "a thing", is_ours, "OUT") as whole:
        (whole / "ours").write_text(text)


def fail(out: Path, error: Exception) -> None:
    with put_whole(out, "a thing", is_ours, "OUT") as whole:
        (whole / "ours").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(out: Path, code: str) -> Path:
    """Run code in a process that is about to put a folder there and kills itself."""
    source = f"""
import os, signal
from pathlib import Path
from edge_client import whole as module
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with module.put_whole(Path({str(out)!r}), "a thing", lambda _: True, "OUT") as whole:
    (whole / "ours").write_text("half")
    {code}
"""
    done = subprocess.run([sys.executable, "-c", source], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = out.parent.glob(f".{out.name}.*")
    return left


def test_what_was_there_is_replaced_and_no_more(tmp_path: Path) -> None:
    put(tmp_path / "made" / "out", "first")
    put(tmp_path / "made" / "out", "second")
    assert (tmp_path / "made" / "out" / "ours").read_text() == "second"
    assert names(tmp_path / "made") == ["out"]
    (tmp_path / "mine").mkdir()
    put(tmp_path / "mine", "an empty one is taken")
    for name in ("other", "made"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "text").write_text("the owner's")
        with pytest.raises(ConfigError, match="holds something else than a thing; name another"):
            put(tmp_path / name, "no")
    with pytest.raises(ConfigError, match=r"can't write a thing to .*text: Not a directory"):
        put(tmp_path / "other" / "text", "no")
    with pytest.raises(StorageError, match="name a folder that can be written to with OUT"):
        put(Path("/proc/x"), "no")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    put(tmp_path / "out", "first")
    for error in (OSError(28, "No space"), SafetensorError("I/O error: … (os error 28)")):
        with pytest.raises(StorageError, match="the disk is full: a thing can't be kept in"):
            fail(tmp_path / "out", error)
    assert (tmp_path / "out" / "ours").read_text() == "first" and names(tmp_path) == ["out"]


def test_what_a_kill_left_is_tidied_by_the_next(tmp_path: Path) -> None:
    put(tmp_path / "out", "first")
    (tmp_path / ".out-original").mkdir()  # the owner's
    killed(tmp_path / "out", "die()")
    assert (tmp_path / "out" / "ours").read_text() == "first"
    put(tmp_path / "out", "second")
    assert names(tmp_path) == [".out-original", "out"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    put(tmp_path / "out", "first")
    left = killed(
        tmp_path / "out", "rename = Path.rename; Path.rename = lambda a, b: rename(a, b) and die()"
    )
    assert not (tmp_path / "out").exists() and (left / "old" / "ours").read_text() == "first"
    with pytest.raises(KeyError):
        fail(tmp_path / "out", KeyError())
    assert (tmp_path / "out" / "ours").read_text() == "first" and names(tmp_path) == ["out"]


def test_one_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    with put_whole(tmp_path / "out", "a thing", is_ours, "OUT") as whole:
        put(tmp_path / "out", "the other's")
        assert whole.is_dir()
        (whole / "ours").write_text("mine")
    assert (tmp_path / "out" / "ours").read_text() == "mine" and names(tmp_path) == ["out"]


def test_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with put_whole(tmp_path / "out", "a thing", is_ours, "OUT") as whole:
            (whole / "ours").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "ours").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
