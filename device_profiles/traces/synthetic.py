"""Draw how devices fare, each thing apart: link, battery, heat, memory of others, coming and going.

Each function gives a series, (time in s, value) in ascending time from 0 on, that holds until the
next. `combine` makes the samples of a trace of them. All draw from the `Random` they are given and
round what they draw, so that one seed gives the same bytes everywhere.

What the figures rest on; where nothing was published it says that it is our choice:

- [norway] Riiser et al., Commute path bandwidth traces from 3G networks (ACM MMSys 2013): its 80
  traces of HSDPA, measured by us second by second in logarithms.
- [npd] NPD Group for OnePlus, 1000 buyers of phones in the US (2022).
- [realitymine] RealityMine, Powerful insights into battery use (2013): phones on charge by hour.
- [talker] Talker Research, 2000 adults in the US (2025).
- [bonawitz] Bonawitz et al., Towards Federated Learning at Scale (2019, arXiv:1902.01046).
- [ookla] Speedtest Global Index, August 2024, fixed broadband worldwide.
- [sbc] ThomasKaiser/sbc-bench results: temperatures in the logs of 109 boards, deciles 1 to 9.
- [rpi] raspberrypi/documentation, Frequency management and thermal control.
- [stutzbach] Stutzbach, Rejaie, Understanding churn in peer-to-peer networks (IMC 2006).
- [flotato] flotato.com, Browsers eating RAM (2020): Chrome takes 1 GB with two tabs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random

from device_profiles.traces.columns import Rows, Samples
from device_profiles.traces.sample import FIELDS, Sample, Value

MINUTE_S, HOUR_S = 60.0, 3600.0
Series = list[tuple[float, Value]]
Numbers = list[tuple[float, float]]
Times = list[tuple[float, float]]
"""From when until when something is so, ascending and apart."""

TRANSPORT_MBIT = {
    "bus": 1.74,
    "car": 1.26,
    "train": 1.26,
    "metro": 0.92,
    "ferry": 0.91,
    "tram": 0.79,
}
"""[norway] Geometric mean of what a link carries down, in the middle of the traces of each kind."""
BETWEEN_TRIPS, WITHIN_TRIP = 0.3, 0.48
"""[norway] Standard deviation of the logarithm: of trips of one kind, and within a trip."""
SAME_AFTER_1_S = 0.9
"""[norway] Correlation from second to second (0.81 to 0.89), and 0.4 after ten (0.32 to 0.46)."""
UP_SHARE = 0.3
"""Of what comes down, in the same moment. Our choice: those traces have no uplink."""
GAP_EVERY_S, GAP_S = 90.0, (2.0, 25.0)
"""Tunnels and cells that are full. Our choice: gaps are cut out of those traces."""
HOME_DOWN_MBIT, HOME_UP_MBIT = 93.99, 48.36
"""[ookla]"""
HOME_SPREAD = 0.6
"""Standard deviation of the logarithm from home to home. Our choice."""

OVERNIGHT_SHARE, TWICE_SHARE = 0.64, 0.69
"""[npd] Who charges overnight; who charges at least twice a day."""
ASKS_AT_PERCENT = 38.0
"""[talker] When people look for a charger."""
TOP_UP_AT_H, TOP_UP_S = 14.0, 40 * MINUTE_S
"""[realitymine] The second peak of the day; [npd] how long 64 % leave a phone plugged in."""
TO_BED_H, UP_H = (23.0, 0.9), (7.0, 0.9)
"""Mean and standard deviation. Our choice, for [realitymine]: most of it is overnight."""
AWAKE_PERCENT_H, ASLEEP_PERCENT_H, CHARGE_PERCENT_H = (3.0, 7.0), 0.7, 45.0
"""Our choice, so that most batteries last the day, as users want it in [realitymine]."""

BOARD_IDLE_C, BOARD_RISE_C = (31.0, 58.0), (8.0, 41.0)
"""[sbc] The first temperature of a log, and how far above it the highest is."""
BOARD_TIME_S = (15.0, 105.0)
"""[sbc] How long 7-zip on all cores takes for 63 % of its rise (86 boards that rise by 8 °C)."""
THROTTLE_C, RECOVER_C = 80.0, 75.0
"""[rpi] Clocks go down from 80 °C on. That they go up again 5 °C below is our choice."""

SESSION_SHAPE, SESSION_SCALE_S = 0.38, 42.4 * MINUTE_S
"""[stutzbach] Weibull distribution of how long peers stay (Debian's torrent)."""
AWAY_S = (2 * MINUTE_S, 40 * MINUTE_S)
"""How long they are away, its logarithm uniform. Our choice."""
LEAVES_FOR_GOOD = 0.08
"""[bonawitz] 6 to 10 % of devices drop out of a round; here as many never come back."""


def combine(series: Mapping[str, Series], end_s: float) -> Samples:
    """Return samples wherever a series has a new value, and a last one at the end.

    `series` is by field of `Sample`; what has none is unknown.
    """
    unknown = Sample()
    values: list[Value] = [getattr(unknown, field.name) for field in FIELDS]
    index_of = {field.name: index for index, field in enumerate(FIELDS)}
    changes: dict[float, list[tuple[int, Value]]] = {0.0: [], end_s: []}
    for name, points in series.items():
        for t, value in points:
            if t <= end_s:
                changes.setdefault(t, []).append((index_of[name], value))
    rows = Rows()
    for t in sorted(changes):
        before = values.copy()
        for index, value in changes[t]:
            values[index] = value
        if values != before or t in (0.0, end_s):
            rows.append(t, values)
    return rows.finish()


def always(value: Value) -> Series:
    """Return a series that never changes."""
    return [(0.0, value)]


def within(times: Times, inside: Value, outside: Value) -> Series:
    """Return one value within times, another outside."""
    found: Series = [(0.0, outside)]
    for start, end in times:
        found += [(start, inside), (end, outside)]
    return found


def mobile_rates(draw: Random, end_s: float, every_s: float) -> tuple[Numbers, Numbers]:
    """Draw what a 3G link carries down and up on one trip, in Mbit/s.

    Its logarithm goes back to the trip's mean and keeps `SAME_AFTER_1_S` of its distance a second.
    """
    transport = draw.choice(sorted(TRANSPORT_MBIT))
    mean = math.log(TRANSPORT_MBIT[transport]) + draw.gauss(0, BETWEEN_TRIPS)
    keeps = SAME_AFTER_1_S**every_s
    distance = draw.gauss(0, WITHIN_TRIP)
    down: Numbers = []
    for step in range(int(end_s / every_s) + 1):
        down.append((round(step * every_s, 3), round(math.exp(mean + distance), 3)))
        distance = keeps * distance + draw.gauss(0, WITHIN_TRIP * math.sqrt(1 - keeps**2))
    return down, [(t, round(UP_SHARE * mbit, 3)) for t, mbit in down]


def gaps(draw: Random, end_s: float) -> Times:
    """Draw when a mobile link carries nothing."""
    found: Times = []
    t = draw.expovariate(1 / GAP_EVERY_S)
    while t < end_s:
        long_s = draw.uniform(*GAP_S)
        found.append((round(t, 1), round(t + long_s, 1)))
        t += long_s + draw.expovariate(1 / GAP_EVERY_S)
    return found


def home_rates(draw: Random) -> tuple[float, float]:
    """Draw what the line of a home carries down and up, in Mbit/s."""
    factor = math.exp(draw.gauss(0, HOME_SPREAD))
    return round(HOME_DOWN_MBIT * factor, 1), round(HOME_UP_MBIT * factor, 1)


def plugged_in(draw: Random, begins_h: float, end_s: float) -> Times:
    """Draw when a phone is charged; the series begins at an hour of the day."""
    overnight = draw.random() < OVERNIGHT_SHARE
    found: Times = []
    day = 0.0
    while (day - begins_h) * HOUR_S < end_s:
        if draw.random() < TWICE_SHARE:
            start = day + TOP_UP_AT_H + draw.gauss(0, 1.5)
            found.append((start, start + TOP_UP_S / HOUR_S))
        start = day + draw.gauss(*TO_BED_H)
        # Who does not charge overnight plugs the phone in after coming home.
        hours = (day + 24 + draw.gauss(*UP_H) - start) if overnight else draw.uniform(0.7, 2.0)
        start -= 0 if overnight else draw.uniform(1, 4)
        found.append((start, start + hours))
        day += 24
    seconds = [((a - begins_h) * HOUR_S, (b - begins_h) * HOUR_S) for a, b in sorted(found)]
    return _apart([(max(0.0, a), min(end_s, b)) for a, b in seconds if b > 0 and a < end_s])


def battery(
    draw: Random, charging: Times, begins_h: float, end_s: float, every_s: float
) -> Numbers:
    """Return how full a battery is, in percent."""
    level = draw.uniform(ASKS_AT_PERCENT, 85.0)
    awake = draw.uniform(*AWAKE_PERCENT_H)
    found: Numbers = []
    for step in range(int(end_s / every_s) + 1):
        t = step * every_s
        found.append((t, round(level, 1)))
        hour = (begins_h + t / HOUR_S) % 24
        asleep = hour < UP_H[0] or hour > TO_BED_H[0]
        plugged = any(start <= t < end for start, end in charging)
        rate = CHARGE_PERCENT_H if plugged else -(ASLEEP_PERCENT_H if asleep else awake)
        level = min(100.0, max(2.0, level + rate * every_s / HOUR_S))
    return found


def heat(
    draw: Random, loads: Numbers, end_s: float, every_s: float, *, idle_c: float, full_c: float
) -> tuple[Numbers, Series]:
    """Return a processor's temperature (°C) under a load (0 to 1), and when that slows it down.

    Of the way to where a load would bring it, it goes 1 − exp(−Δt / τ) in Δt.
    """
    tau_s = draw.uniform(*BOARD_TIME_S)
    share = 1 - math.exp(-every_s / tau_s)
    celsius, throttled, load, at = idle_c, False, 0.0, 0
    temperature: Numbers = []
    slow: Series = [(0.0, False)]
    for step in range(int(end_s / every_s) + 1):
        t = step * every_s
        while at < len(loads) and loads[at][0] <= t:
            load, at = loads[at][1], at + 1
        temperature.append((t, round(celsius, 1)))
        now = celsius >= THROTTLE_C or (throttled and celsius > RECOVER_C)
        if now != throttled:
            throttled = now
            slow.append((t, now))
        target = idle_c + (full_c - idle_c) * load
        celsius += share * (target - celsius) + draw.gauss(0, 0.3)
    return temperature, slow


def memory_of_others(
    available_mib: float, taken: list[tuple[float, float, float]], *, ramp_s: float, steps: int = 8
) -> Numbers:
    """Return what is left (MiB) where others take a share from when until when: start, end, share.

    They take and give it back in `steps` over `ramp_s`, as programs start and end.
    """
    found: Numbers = [(0.0, round(available_mib))]
    for start, end, share in taken:
        for edge, (before, after) in ((start, (0.0, share)), (end, (share, 0.0))):
            for step in range(1, steps + 1):
                now = before + (after - before) * step / steps
                t = round(edge + ramp_s * (step - 1) / steps, 1)
                found.append((t, round(available_mib * (1 - now))))
    return found


def sessions(draw: Random, end_s: float) -> Times:
    """Draw when a device is there, where it comes and goes; the first session may have begun."""
    t = -draw.uniform(0, 20 * MINUTE_S)
    leaves_at = draw.uniform(0.2, 0.9) * end_s if draw.random() < LEAVES_FOR_GOOD else end_s
    found: Times = []
    while t < leaves_at:
        # Below half a minute nobody would notice that it was there.
        long_s = max(30.0, draw.weibullvariate(SESSION_SCALE_S, SESSION_SHAPE))
        start, end = round(max(0.0, t), 1), round(min(leaves_at, t + long_s), 1)
        if end > start:
            found.append((start, end))
        away_s = math.exp(draw.uniform(math.log(AWAY_S[0]), math.log(AWAY_S[1])))
        t += long_s + away_s
    return found


def _apart(times: Times) -> Times:
    """Join times that meet."""
    found: Times = []
    for start, end in sorted(times):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return [(round(start), round(end)) for start, end in found]
