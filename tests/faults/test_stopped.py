"""SIGTERM and Ctrl-C end each command in good order, whatever it is at."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from protocol.broker import free_port
from protocol.transport import BrokerAddress
from tests.conftest import running_mosquitto
from tests.faults.processes import Program, SmallFleet, last_status

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60


@pytest.mark.parametrize("fleet", [5000], indirect=True)
def test_aggregator_and_devices_stop_when_told(fleet: SmallFleet) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk, kitchen = fleet.device("desk"), fleet.device("kitchen")
    desk.wait_for("step", round=1, step=1)
    kitchen.wait_for("step", round=1, step=1)
    # A service manager tells the agent alone, a terminal everything that it started.
    assert desk.end(signal.SIGTERM) == 0
    assert kitchen.end(signal.SIGINT, group=True) == 0
    assert aggregator.wait_for("device", device="desk", online=False)["state"] == "stopped"
    assert aggregator.end(signal.SIGTERM) == 0
    for device in ("desk", "kitchen"):
        status = last_status(fleet.broker, device)
        assert (status.online, status.state) == (False, "stopped")
    assert [desk.stderr, kitchen.stderr, aggregator.stderr] == ["", "", ""]
    assert not aggregator.of("counted"), "what was not trained to its end is not offered"


def test_a_device_stops_while_it_plans_or_waits(
    fleet: SmallFleet, tmp_path: Path, start: Callable[[Program], Program]
) -> None:
    waiting = fleet.device("desk")
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    measured = tmp_path / "nothing measured yet"
    planning = fleet.device("kitchen", "--cache", measured)
    planning.wait_for("state", state="planning")
    time.sleep(1)
    assert planning.end(signal.SIGTERM, timeout_s=10) == 0
    assert not list(measured.glob("*.json")), "a probe that was ended has measured nothing"
    assert planning.stderr == ""
    assert waiting.end(signal.SIGINT, group=True) == 0
    assert waiting.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_replay_ends_all_that_it_started(
    fleet: SmallFleet,
    tmp_path: Path,
    start: Callable[[Program], Program],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "fleet.toml").write_text(
        "".join(
            f'[[device]]\nname = "{name}"\nprofile = "laptop-16gb"\ndata = "{name}.txt"\n'
            for name in ("kitchen", "desk")
        )
    )
    arguments = ["run", tmp_path / "fleet.toml", "--out", tmp_path / "runs", "--json"]
    replay = start(Program("device_profiles.cli", arguments, tmp_path, "replay"))
    replay.wait_for("state", state="planning")
    children = psutil.Process(replay.process.pid).children(recursive=True)
    assert len(children) >= 3
    # Ctrl-C reaches everything in the terminal, and the impatient press it twice.
    to_all = number == signal.SIGINT
    if to_all:
        os.killpg(replay.process.pid, number)
        time.sleep(0.2)
    assert replay.end(number, group=to_all) == 128 + number
    left = psutil.wait_procs(children, timeout=1)[1]
    # One that has ended stays a zombie until init, which has them all now, has come to it.
    assert [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert replay.stderr == f"ended by {number.name}\n"


def test_services_wait_for_a_broker_that_is_not_up_and_stop_when_told(
    tmp_path: Path, model_file: Path, calibrations: Path, start: Callable[[Program], Program]
) -> None:
    nobody = BrokerAddress("127.0.0.1", free_port())
    fleet = SmallFleet(tmp_path, nobody, model_file, calibrations, start)
    programs = [fleet.device("desk"), fleet.aggregator()]
    for program in programs:
        said = program.wait_for("waiting")
        assert said["what"] == f"the broker at {nobody}"
        assert said["why"] == "Connection refused"
    with running_mosquitto(tmp_path / "broker", port=nobody.port):
        programs[1].wait_for("serving")
        programs[0].wait_for("state", state="planning")
    late = fleet.device("kitchen")
    late.wait_for("waiting")
    for program in (*programs, late):
        assert program.end(signal.SIGTERM, timeout_s=10) == 0
        assert program.stderr == ""
