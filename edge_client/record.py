"""Record how this device fares as a trace: once a second, a line at a time.

Each line is written whole and at once, so a kill loses at most the line it falls on; a power cut
also what the system had not yet put on the disk.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from device_profiles.schema import Link
from device_profiles.traces.format import Sample, header_line, sample_line
from edge_client.errors import ConfigError, StorageError
from edge_client.policy.sensors import OthersLoad
from edge_client.pressure import left_mib, memory_groups
from edge_client.profile_linux import (
    read_available_mib,
    read_power,
    read_temperature_c,
    read_text,
    read_throttled,
)
from edge_client.profile_network import default_interface, read_link
from protocol.errors import os_words

SELDOM_S, NMCLI_S = 60.0, 0.5
"""How often to look at what hardly changes, and how long NetworkManager has for its answer."""
SUSPENDED_S = 1.0
"""More of a gap between the two clocks is a suspended system, not a late reading of one of them."""
BITS, MEGA = 8, 1e6
Rates = Literal["port", "traffic"]
"""Of the link: its port's speed as the kernel has it, or the traffic that was counted."""
Clocks = Callable[[], tuple[float, float]]
"""Seconds that pass while the system is suspended too, and seconds that do not."""


def system_clocks() -> tuple[float, float]:
    """Return this system's clocks."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic()


@dataclass(frozen=True, slots=True)
class _Counted:
    """Hold what had gone over an interface by a time, in bytes."""

    at_s: float
    interface: str
    down: int
    up: int


class Recorder:
    """Read one sample after the other from /proc and /sys below a root."""

    def __init__(self, root: Path, every_s: float, *, rates: Rates, clock: Callable[[], float]):
        self._root, self._rates, self._clock = root, rates, clock
        # Half an interval: each reading is a mean since the one before.
        self._load = OthersLoad(root, lambda: (os.getpid(),), clock, window_s=every_s / 2)
        self._looked_s = -SELDOM_S
        self._link: Link | None = None
        self._limited: list[Path] = []  # cgroups that have a limit
        self._counted: _Counted | None = None

    def read(self, t_s: float) -> Sample:
        """Return how the device is; what the system does not tell is unknown."""
        root = self._root
        interface = default_interface(root)
        power = read_power(root)
        if self._clock() - self._looked_s >= SELDOM_S:
            self._look(self._clock())
        link = self._link if interface else None
        left = [read_available_mib(root), *(left_mib(group) for group in self._limited)]
        available_mib = min((mib for mib in left if mib is not None), default=None)
        load = self._load.read()
        down, up = self._speeds(interface, link)
        return Sample(
            t_s,
            online=interface is not None,
            power=power.source,
            battery_percent=power.battery_percent,
            temperature_c=read_temperature_c(root),
            throttled=read_throttled(root),
            memory_available_mib=None if available_mib is None else float(round(available_mib)),
            cpu_load=None if load is None else round(load, 3),
            down_mbit=down,
            up_mbit=up,
            metered=link.metered if link else None,
        )

    def _look(self, now_s: float) -> None:
        """Look at what takes longer, and hardly changes."""
        self._looked_s = now_s
        self._link = read_link(self._root, ask_s=NMCLI_S)
        groups = memory_groups(self._root)
        self._limited = [group for group in groups if left_mib(group) is not None]

    def _speeds(
        self, interface: str | None, link: Link | None
    ) -> tuple[float | None, float | None]:
        """Return what the link carries down and up, in Mbit/s, or what went over it."""
        if self._rates == "port":
            return (link.down_mbit, link.up_mbit) if link else (None, None)
        before = self._counted
        now = self._counted = _counted(self._root, interface or "", self._clock())
        if not before or not now or before.interface != now.interface:
            return None, None
        gone, seconds = (now.down - before.down, now.up - before.up), now.at_s - before.at_s
        if min(gone) < 0 or seconds <= 0:  # below zero: the counters began anew
            return None, None
        down, up = (round(BITS * more / MEGA / seconds, 3) for more in gone)
        return down, up


@dataclass(frozen=True, slots=True)
class Recorded:
    """Say what a recording came to."""

    samples: int
    seconds: float


def record(
    path: Path,
    recorder: Recorder,
    *,
    name: str,
    profile: str | None,
    source: str,
    every_s: float,
    for_s: float | None,
    clocks: Clocks,
    wait: Callable[[float], bool],
) -> Recorded:
    """Write samples until the time is over or `wait`, which gets seconds, returns True.

    While the system was suspended the device counts as not online.

    Raises:
        ConfigError: there is such a file already, or it can't be made.
        StorageError: a line can't be written, as on a full disk; those before stand.
    """
    file = _create(path)
    try:
        _write(path, file, header_line(name, profile, source, None))
        begin, awake_before = clocks()
        before: Sample | None = None
        samples, tick, t_s = 0, 0, 0.0
        while True:
            now, awake = clocks()
            t_s = round(now - begin, 3)
            if before and (now - begin) - before.t - (awake - awake_before) > SUSPENDED_S:
                asleep = replace(before, t=round(before.t + every_s, 3), online=False)
                _write(path, file, sample_line(asleep, before))
                before, samples = asleep, samples + 1
            if before is None or t_s > before.t:
                sample = recorder.read(t_s)
                _write(path, file, sample_line(sample, before))
                before, samples, awake_before = sample, samples + 1, awake
            # A reading that was late is not made up for: the next one is at its own time.
            tick = max(tick + 1, int((clocks()[0] - begin) / every_s) + 1)
            over = for_s is not None and tick * every_s > for_s + every_s / 2
            if over or wait(max(0.0, begin + tick * every_s - clocks()[0])):
                return Recorded(samples, t_s)
    finally:
        os.close(file)


def _create(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
    except FileExistsError:
        raise ConfigError(f"--out {path} is there already; name a new file") from None
    except OSError as error:
        raise ConfigError(f"--out {path} can't be made: {os_words(error)}") from None


def _write(path: Path, file: int, line: str) -> None:
    """Write a line by one call of the system."""
    data = line.encode()
    try:
        written = os.write(file, data)
    except OSError as error:
        raise StorageError(f"{path} can't be written to: {os_words(error)}") from None
    if written < len(data):
        raise StorageError(f"{path} can't be written to: the disk is full")


def _counted(root: Path, interface: str, at_s: float) -> _Counted | None:
    """Return the bytes that an interface has received and sent; None where nobody counts."""
    text = read_text(root / "proc/net/dev") or ""
    found = re.search(rf"^\s*{re.escape(interface)}:((?:\s*\d+){{9}})", text, re.MULTILINE)
    fields = found[1].split() if found else []
    if len(fields) < 9:
        return None
    return _Counted(at_s, interface, int(fields[0]), int(fields[8]))
