"""Check that the demo's six texts differ, have the promised size, and come out the same again."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from device_profiles.demo_text import PART_NAMES, demo_parts, write_demo_text
from device_profiles.errors import DemoTextError


def test_there_are_six_parts_near_the_target() -> None:
    parts = demo_parts(target_bytes=120_000)
    assert tuple(part.name for part in parts) == PART_NAMES
    assert PART_NAMES == ("topics", "asyncio", "email", "multiprocessing", "markup", "encodings")
    for part in parts:
        assert 110_000 <= part.size_bytes <= 120_000
        assert len(part.documents) >= 6
        assert max(document.size_bytes for document in part.documents) <= 40_000


@pytest.mark.parametrize("target_bytes", [60_000, 150_000])
def test_the_target_is_kept(target_bytes: int) -> None:
    for part in demo_parts(target_bytes=target_bytes):
        assert 0.9 * target_bytes <= part.size_bytes <= target_bytes


@pytest.mark.parametrize("target_bytes", [59_999, 150_001])
def test_another_target_is_refused(target_bytes: int) -> None:
    with pytest.raises(DemoTextError, match="60000 to 150000 bytes"):
        demo_parts(target_bytes=target_bytes)


def test_the_seed_decides_the_files() -> None:
    assert demo_parts(seed=1) == demo_parts(seed=1)
    assert demo_parts(seed=1) != demo_parts(seed=2)


def test_files_are_whole_and_in_one_part_only() -> None:
    parts = demo_parts()
    names = [document.name for part in parts for document in part.documents]
    assert len(names) == len(set(names))
    for part in parts:
        for document in part.documents:
            if document.name.endswith(".py"):
                ast.parse(document.text)


def test_character_tables_are_at_most_half_of_the_encodings() -> None:
    part = demo_parts()[-1]
    tables = sum(d.size_bytes for d in part.documents if "decoding_table" in d.text)
    assert 0 < tables <= 0.6 * part.size_bytes


def test_it_is_written_and_written_again(tmp_path: Path) -> None:
    parts = write_demo_text(tmp_path, seed=4, target_bytes=60_000)
    assert write_demo_text(tmp_path, seed=4, target_bytes=60_000) == parts
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(PART_NAMES)
    for part in parts:
        files = sorted((tmp_path / part.name).iterdir())
        assert [file.name for file in files] == [document.name for document in part.documents]
        assert sum(file.stat().st_size for file in files) == part.size_bytes
        assert {file.suffix for file in files} == {".txt" if part.name == "topics" else ".py"}


def test_another_seed_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    write_demo_text(tmp_path, seed=1, target_bytes=60_000)
    with pytest.raises(DemoTextError, match="something else"):
        write_demo_text(tmp_path, seed=2, target_bytes=60_000)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DemoTextError, match="cannot write"):
        write_demo_text(tmp_path / "file", seed=0)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DemoTextError, match=r"lacks asyncio .*libpython3-stdlib"):
        demo_parts(library=tmp_path)
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "little.py").write_text("x = 1\n" * 100)
    with pytest.raises(DemoTextError, match="only 600 bytes"):
        demo_parts(library=tmp_path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DemoTextError, match="lacks pydoc_data"):
        demo_parts()
