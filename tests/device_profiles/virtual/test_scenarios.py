"""Every scenario in short form: what must hold in it does, with the agent's own code."""

from __future__ import annotations

from datetime import timedelta

import pytest

from device_profiles.traces.format import Trace
from device_profiles.traces.scenarios import find_scenario
from device_profiles.virtual.options import Options
from tests.device_profiles.virtual.conftest import Replay, Run

SEED = 1
Spans = list[tuple[float, float]]


def training_spans(run: Replay, device: str) -> Spans:
    """Return when a device was at training, by what it said of itself."""
    spans, since = [], None
    for event in run.events:
        if event.get("device") != device or event["event"] != "state":
            continue
        if event["state"] == "training":
            since = event["time"] if since is None else since
        elif since is not None:
            spans.append((since, event["time"]))
            since = None
    return spans


def traces_of(name: str, devices: int) -> list[Trace]:
    return find_scenario(name).traces(devices, SEED)


def nothing_counts_twice(run: Replay) -> None:
    counted = run.counted()
    assert len(counted) == len(set(counted)) == sum(r["counted"] for r in run.rounds)
    assert all(r["devices"] == r["counted"] for r in run.rounds)


@pytest.mark.parametrize("optimizer", ["adamw", "fit"])
def test_memory_pressure(replay: Run, optimizer: str) -> None:
    run = replay(
        Options(scenario="memory-pressure", devices=5, seed=SEED, resolution_s=2),
        rounds=10,
        pruning={"enabled": False},
        policy={"min_devices": 3, "quorum": 2, "deadline_s": 200},
        training={"optimizer": optimizer},
    )
    assert run.result["state"] == "finished"
    assert not run.of("killed") and not run.of("ended"), "no device is killed"
    ranks = {(e["device"], e["time"] > 0): e["rank"] for e in run.of("plan")}
    start = {device: rank for (device, _), rank in ranks.items()}
    short = [e for e in run.of("planned-anew") if 300 < e["time"] < 960]
    fell = {e["device"] for e in short if e["rank"] < start[e["device"]]}
    lean = {e["device"] for e in short if "without Adam's moments" in e["plan"]}
    waited = [e for e in run.of("state") if "memory" in e.get("detail", "")]
    if optimizer == "adamw":
        assert fell and not lean, "ranks fall"
    else:
        assert lean and not fell, "Adam's moments go first"
    assert waited and all(e["time"] > 300 for e in waited)
    after = {e["device"]: e["rank"] for e in run.of("aggregator.counted") if e["time"] > 1100}
    assert after and (fell | lean) & {*after}
    assert all(after[d] == start[d] for d in after), "and recover"


def test_flaky_3g(replay: Run) -> None:
    devices = 6
    run = replay(
        Options(scenario="flaky-3g", devices=devices, seed=SEED, resolution_s=2),
        rounds=3,
        policy={"min_devices": 2, "quorum": 1, "deadline_s": 240},
    )
    assert run.result["state"] == "finished"
    nothing_counts_twice(run)
    assert run.of("offline"), "links were lost"
    opened = {e["round"]: e["time"] for e in reversed(run.of("aggregator.round"))}
    for each in run.rounds:
        assert each["merged_s"] - opened[each["round"]] <= 240 + 240 + 1
    # What a device got by a time is no more than its trace's link carried until then.
    traces = {f"recorded-{i:05d}": t for i, t in enumerate(traces_of("flaky-3g", devices))}
    for device, trace in traces.items():
        told = [e for e in run.of("bytes") if e["device"] == device]
        if told:
            last = max(told, key=lambda e: e["time"])
            assert 8 * last["down"] <= carried_bits(trace, last["time"])


def carried_bits(trace: Trace, until_s: float) -> float:
    """Return what a trace's link carries at most: a message keeps the rate that it began with."""
    seconds = range(int(until_s) + 1)
    most = [max(trace.looped(t).down_mbit or 0.0, 0.001) for t in seconds]
    return 1e6 * sum(max(most[max(0, t - 5) : t + 1]) for t in seconds)


def test_flash_crowd(replay: Run) -> None:
    devices = 40
    run = replay(
        Options(scenario="flash-crowd", devices=devices, seed=SEED, resolution_s=5),
        rounds=1,
        policy={"min_devices": 30, "quorum": 20, "deadline_s": 500},
    )
    assert run.result["ended"] == "finished"
    came = [e["time"] for e in run.of("online")]
    assert len(came) == devices and max(came) - min(came) <= 5
    unfit = {e["device"] for e in run.of("ended")}
    assert {e["device"] for e in run.of("plan")} | unfit == {e["device"] for e in run.of("online")}
    nothing_counts_twice(run)
    assert run.rounds[0]["counted"] == devices - len(unfit) >= 30


def test_device_churn(replay: Run) -> None:
    run = replay(
        Options(scenario="device-churn", devices=8, seed=SEED, resolution_s=5),
        rounds=6,
        training={"steps": 12, "tokens_per_step": 1024},
        policy={"min_devices": 2, "quorum": 2, "deadline_s": 900},
    )
    assert run.result["state"] == "finished", "every round ends"
    assert len(run.of("offline")) >= 2 and len(run.of("online")) > 8
    nothing_counts_twice(run)
    first_left = min(e["time"] for e in run.of("offline"))
    back = {e["device"] for e in run.of("online") if e["time"] > first_left}
    last = {e["device"] for e in run.of("aggregator.counted") if e["time"] > first_left}
    assert back & last, "who comes back goes on"


def test_stale_devices(replay: Run) -> None:
    run = replay(
        Options(scenario="stale-devices", devices=6, seed=SEED, resolution_s=5),
        rounds=8,
        training={"steps": 12, "tokens_per_step": 1024},
        policy={"min_devices": 4, "quorum": 3, "deadline_s": 1500, "late_updates": 5},
    )
    assert run.result["state"] == "finished"
    nothing_counts_twice(run)
    late = [e for e in run.of("aggregator.counted") if e["behind"]]
    assert late, "updates came late, and counted in the round that was open"
    uploads = [(e["device"], e["round"] - e["behind"]) for e in run.of("aggregator.counted")]
    assert len(uploads) == len(set(uploads)), "each for one round at most"
    gone = {e["device"] for e in run.of("offline")}
    assert {e["device"] for e in late} <= gone
    versions = [e for e in run.of("evaluated") if e["device"] in gone]
    assert max(e["round"] for e in versions) == 8, "who is back goes on with the newest"


def test_thermal_throttle(replay: Run) -> None:
    devices, limit_c = 6, 70.0
    run = replay(
        Options(scenario="thermal-throttle", devices=devices, seed=SEED, resolution_s=2),
        rounds=4,
        policy={"min_devices": 3, "quorum": 2, "deadline_s": 600},
    )
    assert run.result["state"] == "finished"
    waited = [e for e in run.of("state") if "processor has" in e.get("detail", "")]
    assert waited, "some got too hot"
    traces = {f"recorded-{i:05d}": t for i, t in enumerate(traces_of("thermal-throttle", devices))}
    for device, trace in traces.items():
        for start, end in training_spans(run, device):
            hot = [s for s in range(int(start) + 31, int(end)) if (heat(trace, s)) >= limit_c]
            assert not hot, f"{device} trained at {hot[0]} s though it was hot"
    again = {e["device"] for e in waited}
    assert again & {e["device"] for e in run.of("aggregator.counted")}, "who cools down goes on"


def heat(trace: Trace, time_s: float) -> float:
    return trace.looped(time_s).temperature_c or 0.0


def test_overnight_charging(replay: Run) -> None:
    devices = 6
    run = replay(
        Options(scenario="overnight-charging", devices=devices, seed=SEED, resolution_s=30),
        rounds=4,
        policy={"min_devices": 3, "quorum": 3, "deadline_s": 7200},
    )
    assert run.result["state"] == "finished"
    traces = {f"recorded-{i:05d}": t for i, t in enumerate(traces_of("overnight-charging", 6))}
    for device, trace in traces.items():
        for start, end in training_spans(run, device):
            seconds = range(int(start) + 1, int(end), 10)
            assert all(trace.looped(s).power == "mains" for s in seconds), "on mains alone"
    for event in run.of("aggregator.counted"):
        assert not traces[event["device"]].looped(event["time"]).metered, "where it costs nothing"
    morning = timedelta(hours=14).total_seconds()  # it begins at 18:00
    assert len({d for d, _ in run.counted()}) >= 3
    assert run.result["virtual_s"] < morning
