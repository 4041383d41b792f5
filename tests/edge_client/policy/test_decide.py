"""The owner's policy on replayed traces: the real decision, a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from device_profiles.schema import Power
from edge_client.policy.decide import FREE, Decision, DeviceState, Used, decide
from edge_client.policy.owner import Policy
from edge_client.policy.sensors import Sensors

MONDAY = datetime(2026, 3, 2, 0, 0)
Sample = tuple[datetime, DeviceState, Used]


def replay(policy: Policy, samples: Iterable[Sample]) -> list[Decision]:
    """Return the decision at each sample, each knowing the one before."""
    decisions, before = [], FREE
    for now, device, used in samples:
        before = decide(policy, device, now, used, before)
        decisions.append(before)
    return decisions


def changes(decisions: list[Decision]) -> list[tuple[int, str]]:
    """Return where what speaks against training changes, and to what."""
    found, before = [], ""
    for at, decision in enumerate(decisions):
        kinds = ",".join(reason.kind for reason in decision.train)
        if kinds != before:
            found.append((at, kinds))
        before = kinds
    return found


def every(minutes: float, devices: Iterable[DeviceState], used: Used = Used()) -> Iterator[Sample]:  # noqa: B008
    for number, device in enumerate(devices):
        yield MONDAY + timedelta(minutes=minutes * number), device, used


def on_battery(percent: float | None) -> DeviceState:
    return DeviceState(power=Power(source="battery", battery_percent=percent))


def on_mains(percent: float | None = None) -> DeviceState:
    return DeviceState(power=Power(source="mains", battery_percent=percent))


def test_without_a_policy_nothing_is_held_up() -> None:
    worst = DeviceState(Power(source="battery", battery_percent=1), 110.0, 1.0, True)
    assert decide(Policy(), worst, MONDAY, Used(10**12, 10**6)) == FREE


def test_a_battery_that_falls_and_charges_overnight() -> None:
    # One sample a minute: from 60 % down to 30 %, plugged in, up to 50 %, unplugged again.
    falling = [on_battery(60 - n) for n in range(31)]
    charging = [on_mains(30 + n) for n in range(21)]
    again = [on_battery(50 - n) for n in range(15)]
    decisions = replay(Policy(battery_above=40), every(1, [*falling, *charging, *again]))
    assert changes(decisions) == [(20, "battery"), (31, ""), (62, "battery")]
    (reason,) = decisions[20].train
    assert reason.detail == "the battery is at 40 %; until there is mains power, or 45 %"


def test_a_battery_at_its_limit_does_not_flap() -> None:
    levels = [41, 40, 41, 40, 42, 44, 45, 44, 41, 40, 41]
    decisions = replay(Policy(battery_above=40), every(1, map(on_battery, levels)))
    assert changes(decisions) == [(1, "battery"), (6, ""), (9, "battery")]


def test_mains_alone_and_what_is_unknown() -> None:
    policy = Policy(battery_above=100)
    (reason,) = decide(policy, on_battery(100), MONDAY, Used()).train
    assert reason.detail == "the battery is at 100 %; until there is mains power"
    assert decide(policy, on_mains(3), MONDAY, Used()) == FREE
    assert decide(policy, on_battery(None), MONDAY, Used()).train
    # No battery and no word of mains: a board with a plug. A battery of which nothing is said:
    unplugged = DeviceState(power=Power(source="unknown", battery_percent=50))
    assert decide(policy, DeviceState(), MONDAY, Used()) == FREE
    assert decide(policy, unplugged, MONDAY, Used()).train


def test_heat_that_comes_and_goes_with_training() -> None:
    temperature, samples, training = 50.0, [], True
    policy, before = Policy(temperature_below=75), FREE
    for _ in range(200):  # 10 s each: training heats, waiting cools
        before = decide(policy, DeviceState(temperature_c=temperature), MONDAY, Used(), before)
        training = not before.train
        temperature += 0.5 if training else -0.5
        samples.append((training, temperature))
    waits = sum(1 for (one, _), (two, _) in pairwise(samples) if one > two)
    assert max(t for _, t in samples) <= 75
    assert min(t for trains, t in samples[60:]) >= 69
    assert 3 <= waits <= 9, "it stops for minutes each time, not at each sample"


def test_hours_over_midnight_and_at_the_weekend() -> None:
    policy = Policy(hours=["22:00-07:00", "sat-sun 00:00-24:00"])
    week = list(replay(policy, every(30, [DeviceState()] * (7 * 48))))
    shown = [(MONDAY + timedelta(minutes=30 * at), kinds) for at, kinds in changes(week)]
    words = [f"{at:%a %H:%M} {'stop' if kinds else 'go'}" for at, kinds in shown]
    assert words[:4] == ["Mon 07:00 stop", "Mon 22:00 go", "Tue 07:00 stop", "Tue 22:00 go"]
    assert words[-2:] == ["Fri 07:00 stop", "Fri 22:00 go"], "the weekend is free"
    noon = MONDAY + timedelta(days=4, hours=12)
    (reason,) = decide(policy, DeviceState(), noon, Used()).train
    assert reason.detail == "outside the owner's hours; until Friday 22:00"


def test_a_network_that_is_metered_for_a_while() -> None:
    policy = Policy(metered="wait")
    words = [None, False, True, True, False, None]
    decisions = replay(policy, every(1, [DeviceState(metered=word) for word in words]))
    assert [bool(decision.transfer) for decision in decisions] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    assert not any(decision.train for decision in decisions), "what is there may be trained on"


def test_what_a_day_may_cost() -> None:
    policy = Policy(mib_a_day=2, minutes_a_day=30)
    assert decide(policy, DeviceState(), MONDAY, Used(2 * 2**20 - 1, 1799.0)) == FREE
    spent = decide(policy, DeviceState(), MONDAY, Used(2 * 2**20, 1800.0))
    assert [r.kind for r in spent.train] == ["minutes"]
    assert [r.kind for r in spent.transfer] == ["bytes"]
    assert decide(policy, DeviceState(), MONDAY, Used(), spent) == FREE, "the next day"


class Machine:
    """A tree as /proc and /sys have it, of a device with two cores, as a trace goes on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.busy = self.idle = self.own = 0
        self.time_s = 0.0
        zone = root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text("48250\n")
        (root / "proc/7").mkdir(parents=True)
        (root / "proc/loadavg").write_text("1.00 0.50 0.25 1/100 7\n")
        self.run(0, 0.0, 0.0)

    def run(self, seconds: float, others: float, own: float) -> None:
        """Let time pass in which others, and the own process 7, use so many of the two cores."""
        self.time_s += seconds
        self.busy += int(100 * seconds * (others + own))
        self.idle += int(100 * seconds * (2 - others - own))
        self.own += int(100 * seconds * own)
        ticks = f"{self.busy} 0 0 {self.idle} 0 0 0 0 0 0"
        cores = "\ncpu0 1 1\ncpu1 1 1\n"
        (self.root / "proc/stat").write_text(f"cpu  {ticks}{cores}")
        fields = " ".join(["S", *["0"] * 10, str(self.own), "0"])
        (self.root / "proc/7/stat").write_text(f"7 (my (odd) name) {fields} 0 0\n")


def test_load_of_others_is_what_is_left_without_the_own(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    sensors = Sensors(tmp_path, pids=lambda: [7, 8], clock=lambda: machine.time_s)
    policy, before = Policy(idle_below=0.3, temperature_below=75), FREE
    trace = [(0, 0, 0), (10, 0.1, 1.0), (5, 2.0, 0.0), (5, 1.5, 0.5), (10, 0.5, 0), (10, 0.1, 0)]
    loads = []
    for seconds, others, own in trace:
        machine.run(seconds, others, own)
        state = sensors.read(policy)
        before = decide(policy, state, MONDAY, Used(), before)
        loads.append((round(state.others_load or 0, 3), [r.kind for r in before.train]))
    assert loads == [
        (0.5, ["load"]),  # before anything is measured: the system's own mean
        (0.05, []),
        (0.05, []),  # its window is not over
        (0.875, ["load"]),
        (0.25, ["load"]),  # below the limit, and not by the margin
        (0.05, []),
    ]
    assert state.temperature_c == 48.25
    assert Sensors(tmp_path / "nothing").read(policy) == DeviceState(), "unknown"


@pytest.mark.parametrize(
    ("said", "metered"),
    [
        ("yes", True),
        ("yes (guessed)", True),
        ("no (guessed)", False),
        ("unknown", None),
        ("", None),
    ],
)
def test_network_manager_is_asked_of_the_default_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, metered: bool | None
) -> None:
    nmcli = tmp_path / "bin" / "nmcli"
    nmcli.parent.mkdir()
    nmcli.write_text(f'#!/bin/sh\n[ "${{*#*METERED }}" = "device show wlan0" ] && echo "{said}"\n')
    nmcli.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nmcli.parent}:/usr/bin:/bin")
    route = tmp_path / "proc/net/route"
    route.parent.mkdir(parents=True)
    route.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t700\t00000000\t0\n"
        "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\n"
        "wlan0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"
    )
    assert Sensors(tmp_path).read(Policy(metered="wait")).metered is metered
    route.unlink()
    assert Sensors(tmp_path).read(Policy(metered="wait")).metered is None
