"""What an owner is told to install is there to be installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_client import backends
from protocol.extras import how_to_install

ROOT = Path(__file__).parents[2]


def test_extras_are_told_as_readme_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    assert backends.missing_torch("answering") == (
        "answering with torch needs torch, transformers, peft; in a clone of the project: "
        "pip install '.[edge]' -c constraints.txt"
    )
    assert "pip install '.[edge]' -c constraints.txt" in (ROOT / "README.md").read_text()


def test_extras_that_are_told_exist() -> None:
    sources = [
        path.read_text()
        for package in ("aggregator", "device_profiles", "edge_client", "protocol")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert not [text for text in sources if "install 'tunefleet" in text], "no registry has it"
    named = {name for s in sources for name in re.findall(r"how_to_install\(['\"](\w+)", s)}
    project = (ROOT / "pyproject.toml").read_text()
    assert {"edge", "export", "chat", "parquet", "aggregator"} <= named
    for name in named:
        assert re.search(rf"^{name} = \[", project, re.MULTILINE), name
    assert how_to_install("edge").endswith("pip install '.[edge]' -c constraints.txt")
