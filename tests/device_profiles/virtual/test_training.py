"""Devices that really train, and a pool that real training makes; and the command for both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from device_profiles import cli
from device_profiles.virtual.broker import find_mosquitto
from device_profiles.virtual.command import run_traces
from device_profiles.virtual.options import Options
from protocol.errors import TunefleetError

TEXT = "The kettle was on, and so it was tea that they had. Nobody minded the rain at all. "
JOB = """
rounds = 2
ladder = [2]

[training]
steps = 2
tokens_per_step = 64
max_tokens = 64

[policy]
min_devices = 3
quorum = 3
deadline_s = 100000
"""


def fleet_replay(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "device_profiles.cli", *map(str, arguments)]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_real_and_recorded_training_come_out_alike_from_a_runs_log(tmp_path: Path) -> None:
    for name in ("kitchen", "desk"):
        pages = (f"In the {name}, day {day}. {TEXT}" for day in range(60))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(pages))
    (tmp_path / "job.toml").write_text(JOB)
    done = fleet_replay(
        tmp_path,
        *("run", "--scenario", "stale-devices", "--devices", 4, "--seed", 5),
        *("--fidelity", "train=1,recorded=2,headless=1", "--job", "job.toml"),
        *("--data", "kitchen.txt", "--data", "desk.txt", "--out", "runs", "--until", 48),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training once at each of the ranks [2]" in done.stdout
    first = tmp_path / "runs" / "latest"
    found = result(first)
    assert [each["counted"] for each in found["rounds"]] == [3, 3]
    assert found["rounds"][0]["loss"] > 0, "who trains has measured its loss"
    began_with, version = found["rounds"][1]["loss"], found["rounds"][0]["version_losses"]
    assert [*version] == ["train-00000"], "what its text is worth with each version"
    assert version["train-00000"] == pytest.approx(began_with, rel=0.01)
    assert found["base_loss"] == pytest.approx(found["rounds"][0]["loss"], rel=0.01)
    assert (first / "adapter" / "adapter_model.safetensors").exists()
    assert (first / "devices" / "train-00000" / "adapter").is_dir(), "and keeps its result"
    pool = json.loads((first / "pool" / "pool.json").read_text())
    assert [each["rank"] for each in pool["updates"]] == [2]

    done = fleet_replay(tmp_path, "again", first.resolve(), "--out", "again")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bit for bit: {found['adapter_sha256'][:16]}" in done.stdout
    (second,) = (path for path in (tmp_path / "again").iterdir() if path.is_dir())
    assert result(second)["adapter_sha256"] == found["adapter_sha256"]

    done = fleet_replay(tmp_path, "compare", first.resolve(), second)
    assert done.returncode == 0, done.stdout + done.stderr
    lowest = min(each["version_loss"] for each in found["rounds"])
    assert f"virtual time to a loss of {lowest:.4f}" in done.stdout
    assert "the same adapter, bit for bit" in done.stdout and (second / "compare.html").exists()


def test_what_is_wrong_with_a_command_is_said_in_a_line(tmp_path: Path) -> None:
    done = fleet_replay(tmp_path, "run", "nothing-here")
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "can't be read" in said and "Traceback" not in said, said
    flaky = Options(scenario="flaky-3g")
    for options, why in (
        (Options(scenario="sunshine", devices=2), "no scenario has this name"),
        (flaky, "say how many with --devices"),
        (Options(), "name a trace, a folder of traces, or a --scenario"),
        (replace(flaky, devices=2, fidelity="train=3"), "3 devices are more than --devices 2"),
    ):
        with pytest.raises(TunefleetError, match=why):
            run_traces(options, tmp_path / "runs", as_json=False)
    assert not list((tmp_path / "runs").iterdir()), "nothing is left of what did not begin"
    with pytest.raises(typer.BadParameter, match="are for traces"):
        cli.run(None, devices=2)
