"""Buffered rounds beside synchronous ones on the same traces, and how two such runs compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.buffered import unequal_traces
from device_profiles.virtual.compare import Run as Kept
from device_profiles.virtual.compare import common_loss, same_result, table, write_picture
from device_profiles.virtual.options import Options
from protocol.human import human_seconds
from tests.device_profiles.virtual.conftest import Replay, Run

LAPTOP, DEVICES = 1, 6
"""The laptop's place among the demo's devices by name, and how many these are."""
BUFFERED = {"mode": "buffered", "buffer": 2, "max_staleness": 20}


def by_device(run: Replay) -> list[int]:
    devices = [device for device, _ in run.counted()]
    return [devices.count(f"recorded-{i:05d}") for i in range(DEVICES)]


def test_buffered_rounds_do_not_wait_for_the_slowest_and_come_out_alike(
    replay: Run, tmp_path: Path
) -> None:
    traces = Options(traces=str(unequal_traces(tmp_path / "traces")), seed=1)
    plain = replay(traces, rounds=2)
    buffered = replay(traces, rounds=8, policy=BUFFERED)
    assert by_device(plain) == [2] * DEVICES, "each round has all"
    laptop = by_device(buffered)[LAPTOP]
    assert laptop == max(by_device(buffered)) > min(by_device(buffered))
    assert all(each["counted"] >= 2 for each in buffered.rounds)
    uploads = [(e["device"], e["round"] - e["behind"]) for e in buffered.of("aggregator.counted")]
    assert len(uploads) == len(set(uploads)), "from one version each delivers once"
    assert any(e["behind"] for e in buffered.of("aggregator.counted")), "of older versions too"
    times = [each["merged_s"] for each in buffered.rounds]
    slowest_s = plain.rounds[0]["merged_s"]
    assert len([at for at in times if at <= slowest_s]) >= 2, "before the slowest has delivered"
    same = replay(traces, rounds=8, policy=BUFFERED)
    assert same_result(Kept(buffered.folder), Kept(same.folder))[0]
    assert [each["merged_s"] for each in same.rounds] == times


def with_losses(run: Replay, base: float | None, losses: Sequence[float | None]) -> Kept:
    """Write into a run's result what its versions were worth, as where devices train."""
    path = run.folder / "result.json"
    result = json.loads(path.read_text()) | {"base_loss": base}
    for each, loss in zip(result["rounds"], losses, strict=True):
        each["version_loss"] = loss
    path.write_text(json.dumps(result))
    return Kept(run.folder)


def test_two_runs_are_compared_by_the_virtual_time_to_the_same_loss(
    replay: Run, tmp_path: Path
) -> None:
    traces = Options(traces=str(unequal_traces(tmp_path / "traces")), seed=1)
    runs = replay(traces, rounds=2), replay(traces, rounds=4, policy=BUFFERED)
    one, other = (Kept(run.folder) for run in runs)
    assert common_loss(one, other) is None, "nobody has measured any"

    one = with_losses(runs[0], 2.9, [2.7, 2.6])
    other = with_losses(runs[1], 2.9, [2.8, 2.65, 2.66, 2.62])
    assert common_loss(one, other) == 2.62, "the lowest that both came to"
    assert one.reached_s(2.62) == one.rounds[1]["merged_s"]
    assert other.reached_s(2.66) == other.rounds[1]["merged_s"], "for the first time"
    assert other.reached_s(2.61) is None
    rows = {name: (a, b) for name, a, b in table(one, other)}
    times = rows["virtual time to a loss of 2.6200"]
    assert times == (
        human_seconds(one.rounds[1]["merged_s"]),
        human_seconds(other.rounds[3]["merged_s"]),
    )
    write_picture(one, other, tmp_path / "two.html")
    assert "each version over virtual time" in (tmp_path / "two.html").read_text()

    other = with_losses(runs[1], 2.95, [2.8, None, None, 2.62])
    assert common_loss(one, other) is None, "measured on other text"
