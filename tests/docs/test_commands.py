"""Every command that README and docs show works as it stands."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import ROOT, all_commands

INSTALL = "scripts/arm64_smoke.sh"
SCENARIOS = "tests/device_profiles/virtual/test_scenarios.py"
ENGINES = "tests/device_profiles/virtual/test_engines.py"
SHARED_INTAKE = "tests/aggregator/test_shared_intake.py"
ELSEWHERE = {
    r"make (demo|test)\b.*": ".ci/run",
    r"(sudo apt-get|python3 -m venv|git clone|cd tunefleet).*": INSTALL,
    r"\.venv/bin/pip install '\.\[(edge|aggregator|onnx|export)\]'.*": INSTALL,
    r"ulimit .*": "tests/security/fleet.py",
    r"sudo (cp -r ~/fleet/systemd/|systemctl ).*": "tests/security/test_commands.py",
    r"\.venv/bin/fleet-replay demo .*": "tests/device_profiles/test_replay.py",
    r"\.venv/bin/fleet-replay run FLEET\.toml": "tests/device_profiles/test_replay.py",
    r"(\.venv/bin/)?fleet-replay (again|compare) .*": "tests/device_profiles/virtual/test_again.py",
    r"\.venv/bin/fleet-replay run .* --engine ray": ENGINES,
    r"(\.venv/bin/)?fleet-replay run --scenario .*": SCENARIOS,
    r"fleet-replay run traces/ .*": "tests/device_profiles/virtual/test_training.py",
    r"\.venv/bin/fleet-replay import .*": "tests/device_profiles/traces/test_imports.py",
    r"\.venv/bin/edge-client record .*": "tests/edge_client/test_record.py",
    r"\.venv/bin/aggregator (serve .* --shared-intake|intake .*)": SHARED_INTAKE,
    r"\.venv/bin/aggregator serve .* --engine ray": "tests/aggregator/test_engine.py",
    r"\.venv/bin/pip install '\.\[ray\]' .*": ".ci/run",
    r"\.venv-flower/bin/pip install .*": "Makefile",
    r"\.venv/bin/edge-client chat my-export": "tests/edge_client/chat/test_chat_command.py",
}
"""Commands that take a network, a system of one's own or very long → what carries them out."""


def in_the_story() -> set[str]:
    """Return the texts in tests/docs/story.py: the commands that it goes through, and others."""
    parsed = ast.parse((ROOT / "tests/docs/story.py").read_text())
    nodes = (node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant))
    return {value for value in nodes if isinstance(value, str)}


def test_every_command_of_the_documents_is_carried_out_by_something() -> None:
    told = in_the_story()
    for command, document in all_commands().items():
        if command in told:
            continue
        where = [file for pattern, file in ELSEWHERE.items() if re.fullmatch(pattern, command)]
        assert where, f"{document}: no test carries out: {command}"
        assert (ROOT / where[0]).exists(), where[0]


def test_the_story_tells_what_the_documents_show() -> None:
    shown = all_commands()
    for command in in_the_story():
        if command.startswith((".venv/bin/", "aggregator ", "echo ")):
            assert command in shown, f"no document shows: {command}"


@pytest.mark.timeout(900)
def test_a_readers_day(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a network of its own takes root, and unshare")
    if shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists():
        pytest.skip("mosquitto is not installed")
    private = ["unshare", "--net", "--mount"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody have a network of its own")
    done = subprocess.run(
        [*private, sys.executable, "-m", "tests.docs.story", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
