"""A real device waits for its battery, is killed while it waits, and goes on where it was."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_client.policy.polite import LOOK_S
from edge_client.trainer.checkpoint import FILE
from tests.faults.processes import Event, SmallFleet, last_status

STEPS = 120


class Battery:
    """A device whose battery a test sets: a tree as /sys has it."""

    def __init__(self, root: Path, percent: int) -> None:
        self.root, self._folder = root, root / "sys/class/power_supply/BAT0"
        self._folder.mkdir(parents=True)
        (self._folder / "type").write_text("Battery\n")
        (self._folder / "status").write_text("Discharging\n")
        self.set(percent)

    def set(self, percent: int) -> None:
        (self._folder / "capacity").write_text(f"{percent}\n")


def status_of(state: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "edge_client", "status", "--state", str(state), "--json"]
    told: dict[str, object] = json.loads(subprocess.check_output(command, text=True))
    return told


@pytest.mark.timeout(300)  # 40 s where nobody else uses the machine
@pytest.mark.parametrize("fleet", [STEPS], indirect=True)
def test_a_device_waits_for_its_battery_and_goes_on_after_a_kill(
    fleet: SmallFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    battery = Battery(tmp_path / "root", percent=80)
    policy, state = tmp_path / "policy.toml", tmp_path / "kitchen"
    policy.write_text('battery_above = 40\nminutes_a_day = 600\nmetered = "wait"\n')
    options = ["--policy", policy, "--system-root", battery.root]

    drained: list[float] = []

    def drain(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 5 and event["round"] == 1:
            battery.set(30)
            drained.append(time.time())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        aggregator = fleet.aggregator()
        aggregator.wait_for("serving")
        desk = fleet.device("desk")
        first = fleet.device("kitchen", *options, on_event=drain)
        paused = first.wait_for("paused")
        assert paused["lost"] == ""
        later = [e for e in first.of("step") if e["time"] > drained[0] + LOOK_S + 0.002]
        assert len(later) <= 1, "the step under way was its last"
        assert paused["steps"] == first.of("step")[-1]["step"]
        waiting = first.wait_for("state", state="waiting")
        assert "battery is at 30 %" in waiting["detail"] and "45 %" in waiting["detail"]
        aggregator.wait_for("device", device="kitchen", state="waiting")
        assert last_status(fleet.broker, "kitchen").detail == waiting["detail"]
        told = status_of(state)
        assert told["running"] and told["state"] == "waiting"
        assert (told["job"], told["updates"]) == ({"name": "small"}, {"pending": 0, "counted": 0})
        assert told["today"]["bytes"] > 0 or told["today"]["training_s"] >= 0
        monkeypatch.delenv("NOTIFY_SOCKET")
        heard = set()
        while not {"READY=1", "WATCHDOG=1"} <= heard:  # it goes on to be said while it waits
            heard.add(systemd.recv(4096).decode())

    first.end(signal.SIGKILL)
    assert status_of(state)["running"] is False
    assert (state / FILE).exists()
    second = fleet.device("kitchen", *options)
    second.wait_for("state", state="waiting")
    battery.set(46)
    second.wait_for("state", state="training")
    step = second.wait_for("step")
    assert (step["round"], step["step"]) == (1, paused["steps"] + 1), "no step is done twice"
    second.wait_for("step", step=paused["steps"] + 3)
    assert second.end(signal.SIGTERM) == 0
    third = fleet.device("kitchen", *options)
    step = third.wait_for("step")
    assert step["step"] == second.of("step")[-1]["step"] + 1
    for device in (desk, third):
        device.wait_for("finished")
        assert device.wait() == 0
    assert aggregator.wait() == 0
    fleet.counted_once(aggregator)
    lives = (first, second, third)
    steps = [e["step"] for life in lives for e in life.of("step") if e["round"] == 1]
    assert steps == list(range(1, STEPS + 1))
    assert not (state / FILE).exists()
    told = status_of(state)
    assert told["updates"] == {"pending": 0, "counted": 2}
    assert told["today"]["training_s"] > 0
    assert [life.stderr for life in (*lives, desk)] == [""] * 4
