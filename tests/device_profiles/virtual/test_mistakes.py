"""What is wrong with a replay is said in one line, early; what ends one leaves nothing running."""

from __future__ import annotations

import itertools
import json
import resource
import signal
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from device_profiles.cli import app
from device_profiles.errors import ReplayError
from device_profiles.traces.format import Trace, write_trace
from device_profiles.traces.sample import Sample
from device_profiles.traces.scenarios import Scenario
from device_profiles.virtual.broker import _mosquitto
from device_profiles.virtual.command import run_again
from device_profiles.virtual.compare import Run as Kept
from device_profiles.virtual.fleet import cast
from device_profiles.virtual.options import FILE, Options, read_record
from device_profiles.virtual.pool import text_hashes
from device_profiles.virtual.run import RESULT
from device_profiles.virtual.serving import PacedAggregator
from protocol.link import BrokerAddress
from protocol.loop_link import Loop
from tests.device_profiles.virtual.conftest import Run
from tests.device_profiles.virtual.made_pool import LADDER
from tests.faults.processes import Program

CROWD = Options(scenario="flash-crowd", devices=2, seed=1)
POLICY = {"min_devices": 1, "quorum": 1, "deadline_s": 600}


@pytest.mark.parametrize("wrong", [inf, nan, 0.0])
def test_times_without_an_end_are_refused(replay: Run, wrong: float) -> None:
    with pytest.raises(ReplayError, match="--resolution: give a finite time above zero"):
        replay(replace(CROWD, resolution_s=wrong))


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    assert len(text_hashes([tmp_path])) == 1
    with pytest.raises(ReplayError, match=r"--data: No such file .*none"):
        text_hashes([tmp_path, tmp_path / "none"])


def test_a_profile_that_no_one_has_is_named() -> None:
    trace = Trace("kitchen", "raspbery-pi-5", None, None, [Sample(0.0)])
    with pytest.raises(ReplayError, match=r"'kitchen' is of the profile 'raspbery-pi-5'.*-5-8gb"):
        cast([trace], 2, 0, {"recorded": 2})


def test_devices_of_one_profile_share_it() -> None:
    trace = Trace("kitchen", "raspberry-pi-5-8gb", None, None, [Sample(0.0)])
    assert len({id(part.profile) for part in cast([trace], 9, 0, {"recorded": 9})}) == 1


def test_too_many_devices_are_refused_before_anything_is_made(
    replay: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    monkeypatch.delattr(Scenario, "traces")
    with pytest.raises(ReplayError, match="5000 devices need 5200 open files"):
        replay(replace(CROWD, devices=5000))


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"rule": "trust-weights"}, "rule 'trust-weights' asks"),
        ({"probe": {"text": "a public text", "top_k": 4}}, r"the job's \[probe\] asks"),
        ({"rule_settings": {"weights": "discrepancy"}}, "weights 'discrepancy' asks"),
    ],
)
def test_what_takes_text_to_answer_is_asked_of_devices_that_train_alone(
    replay: Run, job: dict[str, Any], said: str
) -> None:
    with pytest.raises(ReplayError, match=f"{said} devices what only those that train can tell"):
        replay(CROWD, **job)


def test_a_fleet_that_sends_nothing_is_refused(replay: Run) -> None:
    with pytest.raises(ReplayError, match="all devices are headless"):
        replay(replace(CROWD, fidelity="headless=2"))


def test_options_of_traces_without_traces_are_refused() -> None:
    for option in (["--speed", "60"], ["--resolution", "2"], ["--devices", "3"]):
        ran = CliRunner().invoke(app, ["run", *option])
        assert ran.exit_code == 2 and "--scenario" in ran.output, option


def test_a_link_follows_its_trace_from_anywhere_and_again_and_again(
    replay: Run, tmp_path: Path
) -> None:
    """Gone for 9.9 s every 33.1 s: no sum of floats on the way may make it miss a turn."""
    samples = [Sample(0.0), Sample(12.3, online=False), Sample(22.2), Sample(33.1)]
    write_trace(tmp_path / "gaps.jsonl", Trace("gaps", None, None, None, samples))
    options = Options(traces=str(tmp_path / "gaps.jsonl"), devices=3, seed=1)
    run = replay(options, rounds=3, training={"steps": 200}, policy=POLICY)
    until = run.result["virtual_s"]
    assert until > 300
    for device in {e["device"] for e in run.of("online")}:
        gone = [e["time"] for e in run.of("offline") if e["device"] == device]
        assert len(gone) == pytest.approx(until / 33.1, abs=1.5)
        between = [later - one for one, later in itertools.pairwise(gone)]
        assert between == pytest.approx([33.1] * len(between))


def test_again_goes_by_what_owners_allowed_then(
    replay: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("minutes_a_day = 600\n")
    run = replay(replace(CROWD, policy=str(policy)), rounds=1, policy=POLICY)
    policy.unlink()
    assert run_again(run.folder, tmp_path / "again", as_json=False)
    (second,) = (tmp_path / "again").iterdir()
    assert read_record(second).owner == read_record(run.folder).owner
    assert read_record(second).owner["minutes_a_day"] == 600

    (second / RESULT).write_text("[]")
    with pytest.raises(ReplayError, match=r"result\.json is damaged"):
        Kept(second)

    record = json.loads((run.folder / FILE).read_text())
    (run.folder / FILE).write_text(json.dumps({**record, "options": {"speed": 0}}))
    with pytest.raises(ReplayError, match="is damaged, or another version wrote it"):
        run_again(run.folder, tmp_path / "again", as_json=False)


def test_a_run_is_repeated_from_any_folder(
    replay: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_trace(tmp_path / "one.jsonl", Trace("one", None, None, None, [Sample(0.0)]))
    monkeypatch.chdir(tmp_path)
    run = replay(Options(traces="one.jsonl"), rounds=1, policy=POLICY)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_again(run.folder, Path("again"), as_json=False)
    assert read_record(run.folder).options["devices"] == 1, "as many as there were traces"


def arguments(made: tuple[Path, Path], tmp_path: Path) -> list[object]:
    """Of a replay that goes on for hours of real time."""
    base, pool = made
    job = {"model": str(base), "ladder": LADDER, "rounds": 1000}
    text = [f"{name} = {json.dumps(value)}" for name, value in job.items()]
    (tmp_path / "job.toml").write_text("\n".join(text))
    what = ["--scenario", "flash-crowd", "--devices", 2, "--pool", pool]
    return ["run", *what, "--job", tmp_path / "job.toml", "--out", tmp_path / "runs"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_replay_that_is_ended(
    made: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    what = [*arguments(made, tmp_path), "--json"]
    with Program("device_profiles.cli", what, tmp_path, "replay") as replay:
        replay.wait_for("aggregator.merged")
        children = psutil.Process(replay.process.pid).children(recursive=True)
        started = [" ".join(child.cmdline()) for child in children]
        for part in ("mosquitto", "aggregator.paced"):
            assert any(part in command for command in started), part
        replay.process.send_signal(number)
        assert psutil.wait_procs(children, timeout=60)[1] == []
        (folder,) = (tmp_path / "runs").iterdir()
        if number is signal.SIGINT:
            replay.process.wait(60)
            said = [e["what"] for e in replay.events if e["event"] == "preparing"]
            assert said[-1] == f"`fleet-replay again {folder}` replays it from its start"
    with pytest.raises(ReplayError, match=f"came to no result: `fleet-replay again {folder}`"):
        Kept(folder)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "Mosquitto has ended; its log is "),
        (signal.SIGTERM, "Mosquitto has ended; its log is "),
        (signal.SIGSTOP, " did not arrive within 20 s at virtual time "),
    ],
)
def test_a_broker_that_is_gone_or_hangs_ends_the_replay_and_is_named(
    made: tuple[Path, Path], tmp_path: Path, number: signal.Signals, said: str
) -> None:
    what = [*arguments(made, tmp_path), "--json"]
    with Program("device_profiles.cli", what, tmp_path, "replay") as replay:
        replay.wait_for("aggregator.merged")
        children = psutil.Process(replay.process.pid).children(recursive=True)
        (broker,) = (child for child in children if "mosquitto" in child.name())
        broker.send_signal(number)
        assert replay.wait(60 if number == signal.SIGSTOP else 15) == 1
        assert psutil.wait_procs(children, timeout=10)[1] == []
    (folder,) = (tmp_path / "runs").iterdir()
    assert replay.stderr.startswith("error: ") and said in replay.stderr
    assert replay.stderr.endswith(f"; `fleet-replay again {folder}` repeats it\n")
    assert replay.stderr.count("\n") == 1


def test_a_broker_that_does_not_start_is_named_with_what_it_says(tmp_path: Path) -> None:
    program = tmp_path / "mosquitto"
    program.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    program.chmod(0o755)
    with (
        pytest.raises(ReplayError, match=r"(?s)Mosquitto did not start; .*no room"),
        _mosquitto(str(program), tmp_path / "broker"),
    ):
        pytest.fail("it has not started")


GONE = """
import sys
print('{"event": "stepped"}', flush=True)
sys.stdin.readline()
sys.exit("no memory")
"""


def test_an_aggregator_that_is_gone_ends_the_replay_and_is_named(tmp_path: Path) -> None:
    """Whichever is at hand: an order to it, or a wait for devices, which hear nothing any more."""
    (tmp_path / "aggregator").mkdir()
    (tmp_path / "aggregator" / "paced.py").write_text(GONE)
    (tmp_path / "aggregator" / "__init__.py").touch()
    loop = Loop()
    broker = BrokerAddress("127.0.0.1", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.chdir(tmp_path)
        gone = PacedAggregator(loop, tmp_path, tmp_path / "job.json", broker, 0.0, lambda _: None)
    try:
        gone._order(do="step", time=0.0)
        with pytest.raises(ReplayError, match="the aggregator has ended: no memory"):
            loop.pump_until(lambda: False, 60)
        with pytest.raises(ReplayError, match="the aggregator has ended: no memory"):
            gone.step(1.0)
    finally:
        gone.stop()  # an order that it has not read does not hide why it ended
        loop.close()
