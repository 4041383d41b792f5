"""docs/security.md names the test that shows each defence: all of them are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if line.startswith("| ") and not line.startswith("| who |")
]
TESTS = "\n".join(
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
)


def test_no_page_has_the_marks_of_a_merge_in_it() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^(<{7} |={7}$|>{7} )", text, re.MULTILINE), page


def test_there_is_a_table() -> None:
    assert len(ROWS) > 15
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}"[:60])
def test_what_shows_a_defence_is_there(row: list[str]) -> None:
    named = re.findall(r"`(.*?)`", row[3])
    assert named, "no test is named"
    for name in named:
        if "/" in name or name.endswith(".py"):
            places = [ROOT / name, ROOT / "tests" / "security" / name]
            places += [ROOT / Path(n).parent / name for n in named if "/" in n]
            assert any(place.exists() for place in places), name
        else:
            assert re.search(rf"^test_\w*{name}", TESTS, re.MULTILINE), name
