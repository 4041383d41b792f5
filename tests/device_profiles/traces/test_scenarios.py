"""Scenarios make the same bytes from the same seed, and what happens in them is what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_profiles.errors import TraceError
from device_profiles.schema import load_profile
from device_profiles.traces.format import Trace, read_traces, write_trace
from device_profiles.traces.scenarios import SCENARIOS, Scenario, find_scenario
from edge_client.policy.owner import doubts, read_policy

NAMES = (
    "overnight-charging",
    "flaky-3g",
    "memory-pressure",
    "thermal-throttle",
    "flash-crowd",
    "device-churn",
    "stale-devices",
)


def test_the_docs_have_every_scenario() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "traces.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \| \d+ (?:h|min) \|", docs, re.M) == [*NAMES]


@pytest.fixture(params=NAMES)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return find_scenario(request.param)


def each_minute(trace: Trace) -> Iterator[float]:
    return (60.0 * minute for minute in range(int(trace.duration_s // 60)))


def test_the_scenarios_we_promise_are_there() -> None:
    assert tuple(SCENARIOS) == NAMES
    with pytest.raises(TraceError, match="device-churn"):
        find_scenario("device-chum")


def test_the_same_seed_gives_the_same_bytes(scenario: Scenario, tmp_path: Path) -> None:
    for folder, devices, seed in (("one", 4, 7), ("two", 9, 7), ("other", 4, 8)):
        for trace in scenario.traces(devices, seed):
            write_trace(tmp_path / folder / f"{trace.name}.jsonl", trace)
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    more = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert len(first) == 4 and len(more) == 9
    assert first.items() <= more.items()  # a larger fleet begins with the same devices
    assert first != other


def test_what_is_written_is_read_and_whole(scenario: Scenario, tmp_path: Path) -> None:
    made = scenario.traces(6, 1)
    for trace in made:
        write_trace(tmp_path / f"{trace.name}.jsonl", trace)
    assert read_traces(tmp_path) == made
    for trace in made:
        assert trace.samples[0].t == 0
        assert trace.duration_s == scenario.duration_s
        assert trace.profile in scenario.profiles
        assert trace.source and scenario.name in trace.source
        total_mib = load_profile(str(trace.profile)).memory.total_mib
        assert total_mib is not None
        for sample in trace.samples:
            assert sample.memory_available_mib is not None
            assert 0 < sample.memory_available_mib <= total_mib


def test_a_scenario_says_what_must_hold_and_its_policy_can_be_read(
    scenario: Scenario, tmp_path: Path
) -> None:
    assert scenario.says and scenario.holds
    path = tmp_path / "policy.toml"
    path.write_text(scenario.policy, encoding="utf-8")
    policy = read_policy(path)
    assert doubts(policy) == []
    assert (scenario.name in ("overnight-charging", "thermal-throttle")) == bool(scenario.policy)


def test_overnight_phones_are_on_mains_by_night_and_out_by_day() -> None:
    scenario = find_scenario("overnight-charging")
    traces = scenario.traces(200, 0)

    def share(hour: float) -> float:
        """Return how many could train and transfer at an hour of the day."""
        at = [trace.at((hour - scenario.begins_h) % 24 * 3600) for trace in traces]
        return sum(s.power == "mains" and not s.metered for s in at) / len(at)

    night, day = share(3), max(share(10), 0.01)
    assert night > 0.5
    assert night > 4 * day  # Bonawitz et al. 2019: four times as many by night
    for trace in traces:
        before = trace.samples[0]
        for sample in trace.samples:
            assert sample.battery_percent is not None and before.battery_percent is not None
            if sample.power == before.power == "battery":
                assert sample.battery_percent <= before.battery_percent + 7.6  # one step's charge
            before = sample


def test_flaky_links_are_those_of_3g() -> None:
    rates = []
    for trace in find_scenario("flaky-3g").traces(60, 0):
        assert any(sample.down_mbit == 0 for sample in trace.samples)
        rates += [sample.down_mbit for sample in trace.samples if sample.down_mbit]
    rates.sort()
    middle = rates[len(rates) // 2]
    assert 0.8 < middle < 1.5  # the measured trips: 0.8 to 1.7 by kind
    assert rates[len(rates) // 20] < 0.5 * middle and rates[-len(rates) // 20] > 2 * middle
    lost = [any(not s.online for s in t.samples) for t in find_scenario("flaky-3g").traces(60, 0)]
    assert 30 < sum(lost) < 60


def test_memory_falls_and_comes_back() -> None:
    for trace in find_scenario("memory-pressure").traces(40, 0):
        begin, middle, end = (trace.at(t).memory_available_mib for t in (0, 600, 1400))
        assert begin is not None and middle is not None
        assert begin == end
        assert 0.19 * begin < middle < 0.41 * begin
        falling = [s.memory_available_mib for s in trace.samples if s.t < 600]
        assert falling == sorted(falling, key=lambda mib: -(mib or 0))


def test_some_boards_throttle_and_all_cool_down() -> None:
    traces = find_scenario("thermal-throttle").traces(60, 0)
    hot, slow = [], []
    for trace in traces:
        temperatures = [s.temperature_c for s in trace.samples if s.temperature_c is not None]
        hot.append(max(temperatures) >= 70)
        slow.append(any(s.throttled for s in trace.samples))
        assert all(
            s.temperature_c is not None and s.temperature_c > 74
            for s in trace.samples
            if s.throttled
        )
        assert min(temperatures) < 60
        cool = [trace.at(t).temperature_c for t in each_minute(trace)]
        assert sum(c is not None and c < 70 for c in cool) >= 5
    assert sum(hot) > 40
    assert 10 < sum(slow) < 60


def test_the_crowd_comes_within_seconds() -> None:
    traces = find_scenario("flash-crowd").traces(100, 0)
    assert not any(trace.at(59.9).online for trace in traces)
    assert all(trace.at(65.1).online for trace in traces)
    came = sorted({trace.samples[1].t for trace in traces})
    assert len(came) > 50 and came[-1] - came[0] > 3


def test_devices_come_and_go() -> None:
    traces = find_scenario("device-churn").traces(200, 0)
    there = [sum(trace.at(t).online for trace in traces) for t in (600, 3600, 7000)]
    assert all(40 < count < 190 for count in there)
    changes = [
        sum(a.online != b.online for a, b in zip(t.samples, t.samples[1:], strict=False))
        for t in traces
    ]
    assert sum(changes) > 400
    assert max(changes) > 8 and min(changes) <= 1
    for_good = [t for t in traces if not any(s.online for s in t.samples if s.t > 6400)]
    assert len(for_good) > 5


def test_every_third_device_is_gone_for_long() -> None:
    for number, trace in enumerate(find_scenario("stale-devices").traces(30, 0)):
        away_s = sum(60 for t in each_minute(trace) if not trace.at(t).online)
        assert trace.at(0).online and trace.at(7100).online
        assert (2300 < away_s < 4900) if number % 3 == 0 else away_s == 0
