"""A replay that is killed leaves nothing behind: neither aggregator, devices nor their training."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.processes import Program

FLEET = """
ladder = [2]

[training]
steps = 1
tokens_per_step = 16777216  # hours in one step, in which training reports nothing
max_tokens = 64

[[device]]
name = "desk"
profile = "laptop-16gb"
data = "desk.txt"
"""


@pytest.mark.timeout(480)  # 40 s where nobody else uses the machine
def test_nothing_outlives_a_replay_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faults.processes.PATIENCE_S", 300)  # nothing is said while measuring
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "fleet.toml").write_text(FLEET)
    pages = [f"page {n}: " + f"what the desk says {n} times. " * 20 for n in range(8)]
    (tmp_path / "desk.txt").write_text("\n\n".join(pages))
    arguments = ["run", tmp_path / "fleet.toml", "--out", tmp_path / "runs", "--json"]
    with Program("device_profiles.cli", arguments, tmp_path, "replay") as replay:
        replay.wait_for("state", device="desk", state="training")
        children = psutil.Process(replay.process.pid).children(recursive=True)
        started = [" ".join(child.cmdline()) for child in children]
        for part in ("aggregator", "edge_client", "spawn_main"):
            assert any(part in command for command in started), part
        replay.process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(children, timeout=60)[1] == []
