"""Name situations in which a fleet has to hold: traces, the owners' policy, what must be so.

A scenario draws each device's trace by the seed, its own name and the device's number alone, so
that a fleet of more devices begins with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from device_profiles.errors import TraceError
from device_profiles.schema import load_profile
from device_profiles.traces import synthetic
from device_profiles.traces.format import Trace
from device_profiles.traces.synthetic import HOUR_S, Series, always, combine, within

LICENCE = "Apache-2.0"
BOARDS = (
    "raspberry-pi-3b-plus-1gb",
    "raspberry-pi-4b-2gb",
    "raspberry-pi-4b-4gb",
    "raspberry-pi-5-8gb",
    "jetson-nano-4gb",
)
MOBILE = ("phone-oneplus-5-6gb", "raspberry-pi-zero-2w-512mb", "raspberry-pi-4b-2gb")
CARRIED = ("phone-oneplus-5-6gb", "phone-galaxy-s8-4gb", "laptop-16gb")


@dataclass(frozen=True, slots=True)
class Device:
    """Be one device of a scenario while its trace is drawn."""

    number: int
    profile: str
    draw: Random

    @property
    def available_mib(self) -> float:
        """Return what a program can take at idle."""
        return _available_mib(self.profile)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Say what happens to a fleet, what its owners allow, and what must hold all the same."""

    name: str
    says: str
    holds: tuple[str, ...]
    duration_s: float
    profiles: tuple[str, ...]
    draw: Callable[[Device], Mapping[str, Series]]
    policy: str = ""
    """Of every owner, as the text of a policy.toml; docs/device.md has its settings."""
    begins_h: float = 0.0
    """Hour of the day at which its traces begin."""

    def traces(self, devices: int, seed: int) -> list[Trace]:
        """Return a trace for each device, sorted by name; the same for the same seed."""
        known: dict[bytes, Any] = {}
        source = f"made by fleet-replay traces --scenario {self.name} --seed {seed}"
        made = []
        for number in range(devices):
            draw = Random(f"{self.name} {seed} {number}")
            device = Device(number, draw.choice(self.profiles), draw)
            samples = combine(self.draw(device), self.duration_s).shared(known)
            name = f"{self.name}-{number:05d}"
            made.append(Trace(name, device.profile, source, LICENCE, samples))
        return made


@cache
def _available_mib(profile: str) -> float:
    available = load_profile(profile).memory.available_mib
    assert available is not None  # every bundled profile says so
    return float(available)


def _at_home(device: Device) -> dict[str, Series]:
    """Return a device on mains and on its home's line, with its memory free."""
    down, up = synthetic.home_rates(device.draw)
    found: dict[str, Series] = {
        "power": always("mains"),
        "memory_available_mib": always(device.available_mib),
        "cpu_load": always(round(device.draw.uniform(0.0, 0.1), 2)),
        "down_mbit": always(down),
        "up_mbit": always(up),
        "metered": always(False),
    }
    return found


def _overnight(device: Device) -> dict[str, Series]:
    """Carry a phone or laptop through a day that begins at six in the evening."""
    begins_h, end_s, every_s = 18.0, 24 * HOUR_S, 600.0
    draw = device.draw
    charging = synthetic.plugged_in(draw, begins_h, end_s)
    down, up = synthetic.home_rates(draw)
    away = (draw.gauss(8.0, 0.7) - begins_h + 24) * HOUR_S  # 18:00 is when it has come home
    out = [(float(round(away)), end_s)]
    trip_down, trip_up = synthetic.mobile_rates(draw, end_s - away, 1800.0)
    left = [(0.0, down), *((round(away + t), mbit) for t, mbit in trip_down)]
    right = [(0.0, up), *((round(away + t), mbit) for t, mbit in trip_up)]
    return _at_home(device) | {
        "power": within(charging, "mains", "battery"),
        "battery_percent": [*synthetic.battery(draw, charging, begins_h, end_s, every_s)],
        "metered": within(out, True, False),
        "down_mbit": [*left],
        "up_mbit": [*right],
    }


def _flaky(device: Device) -> dict[str, Series]:
    """Give a device a 3G link with tunnels; in half of them it loses the connection as well."""
    end_s, every_s = 600.0, 2.0
    draw = device.draw
    down, up = synthetic.mobile_rates(draw, end_s, every_s)
    tunnels = synthetic.gaps(draw, end_s)
    lost = [tunnel for tunnel in tunnels if draw.random() < 0.5]
    return _at_home(device) | {
        "online": within(lost, False, True),
        "down_mbit": _stalled(down, tunnels),
        "up_mbit": _stalled(up, tunnels),
        "metered": always(True),
    }


def _stalled(rates: synthetic.Numbers, tunnels: synthetic.Times) -> Series:
    return [
        (t, 0.0 if any(start <= t < end for start, end in tunnels) else mbit) for t, mbit in rates
    ]


MEMORY_PHASES_S = (300.0, 900.0, 1500.0)
"""Of memory-pressure: others begin within a minute of the first, end of the second; its end."""
LEFT_SHARE = (0.2, 0.4)
"""[flotato] A browser's two tabs take 1 GB, which leaves this of what boards of 1 to 2 GB have."""


def _memory(device: Device) -> dict[str, Series]:
    """Let other programs take most of the memory for ten minutes, and give it back."""
    draw = device.draw
    begin, end, _ = MEMORY_PHASES_S
    start, stop = begin + draw.uniform(0, 60), end + draw.uniform(0, 60)
    taken = 1 - draw.uniform(*LEFT_SHARE)
    left = synthetic.memory_of_others(device.available_mib, [(start, stop, taken)], ramp_s=20.0)
    busy = [(round(start, 1), round(stop, 1))]
    return _at_home(device) | {
        "memory_available_mib": [*left],
        "cpu_load": within(busy, round(draw.uniform(0.2, 0.6), 2), 0.05),
    }


def _hot(device: Device) -> dict[str, Series]:
    """Heat boards up by what others do in turns of minutes, the hotter ones until they throttle."""
    end_s, every_s = 1800.0, 5.0
    draw = device.draw
    idle_c = draw.uniform(40.0, synthetic.BOARD_IDLE_C[1])
    full_c = idle_c + draw.uniform(28.0, synthetic.BOARD_RISE_C[1])
    loads: synthetic.Numbers = [(0.0, 0.05)]
    t = draw.uniform(60, 240)
    while t < end_s:
        busy, rest = draw.uniform(120, 360), draw.uniform(180, 420)
        loads += [(round(t), round(draw.uniform(0.7, 1.0), 2)), (round(t + busy), 0.05)]
        t += busy + rest
    temperature, throttled = synthetic.heat(
        draw, loads, end_s, every_s, idle_c=idle_c, full_c=full_c
    )
    return _at_home(device) | {
        "cpu_load": [*loads],
        "temperature_c": [*temperature],
        "throttled": throttled,
    }


CROWD_AT_S, CROWD_WITHIN_S = 60.0, 5.0


def _crowd(device: Device) -> dict[str, Series]:
    """Bring every device onto the network within seconds, as after a power cut."""
    came = round(CROWD_AT_S + device.draw.uniform(0, CROWD_WITHIN_S), 2)
    return _at_home(device) | {"online": within([(came, 600.0)], True, False)}


def _churn(device: Device) -> dict[str, Series]:
    """Let devices come and go, and some never come back."""
    there = synthetic.sessions(device.draw, 2 * HOUR_S)
    return _at_home(device) | {"online": within(there, True, False)}


STALE_EVERY = 3
"""Every third device goes away with what it has been given."""


def _stale(device: Device) -> dict[str, Series]:
    """Take every third device off the network soon after it began, for most of an hour or more."""
    if device.number % STALE_EVERY:
        return _at_home(device)
    draw = device.draw
    gone = round(draw.uniform(60, 300))
    back = gone + round(draw.uniform(2400, 4800))
    return _at_home(device) | {"online": within([(float(gone), float(back))], False, True)}


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "overnight-charging",
            "Phones and laptops from 18:00 for a day: charged overnight, carried by day over a "
            "metered network. Their owners allow training on mains alone, transfers where they "
            "cost nothing.",
            (
                "no device trains while its trace says battery",
                "no device transfers while its trace says metered",
                "every device that is charged overnight has an update counted by morning",
            ),
            24 * HOUR_S,
            CARRIED,
            _overnight,
            'battery_above = 100\nmetered = "wait"\n',
            begins_h=18.0,
        ),
        Scenario(
            "flaky-3g",
            "Devices on the way with a 3G link that changes from second to second, has gaps, and "
            "is lost in half of them.",
            (
                "an upload that was interrupted goes on with the chunks that are missing",
                "every update counts once",
                "rounds end by their deadline without those whose link was too slow",
            ),
            600.0,
            MOBILE,
            _flaky,
        ),
        Scenario(
            "memory-pressure",
            "Other programs take 60 to 80 % of the memory from the fifth minute to the fifteenth, "
            "and give it back.",
            (
                "no training process is killed for memory",
                "ranks fall, or devices wait, while memory is short",
                "at the end every device trains at its rank of the beginning again",
            ),
            MEMORY_PHASES_S[2],
            BOARDS,
            _memory,
        ),
        Scenario(
            "thermal-throttle",
            "Boards that other programs heat up in turns, some until they throttle. Their owners "
            "allow training below 70 °C.",
            (
                "no device trains for longer than a step while it is 70 °C or hotter",
                "every device that cools down goes on where it stopped",
            ),
            1800.0,
            BOARDS,
            _hot,
            "temperature_below = 70\n",
        ),
        Scenario(
            "flash-crowd",
            "Every device comes onto the network within five seconds, a minute after the start.",
            (
                "every device gets the job and the version",
                "nothing is lost, nothing counts twice",
                "the aggregator's memory stays within its bound",
            ),
            600.0,
            BOARDS,
            _crowd,
        ),
        Scenario(
            "device-churn",
            "Devices come and go for two hours, most sessions short and a few very long; some "
            "never come back.",
            (
                "every round ends",
                "a device that comes back goes on with the round that is open",
                "every update counts once",
            ),
            2 * HOUR_S,
            BOARDS,
            _churn,
        ),
        Scenario(
            "stale-devices",
            "Every third device is gone soon after it was given the job, and is back 40 to 80 "
            "minutes later.",
            (
                "rounds end without those that are gone",
                "a late update counts once, in the round that is open, for less by its staleness",
                "a device that is back goes on with the newest version",
            ),
            2 * HOUR_S,
            BOARDS,
            _stale,
        ),
    )
}


def find_scenario(name: str) -> Scenario:
    """Return a scenario by its name.

    Raises:
        TraceError: there is none of this name; says which there are.
    """
    if name not in SCENARIOS:
        raise TraceError(
            repr(name), f"no scenario has this name; use one of {', '.join(SCENARIOS)}"
        )
    return SCENARIOS[name]
