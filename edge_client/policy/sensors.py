"""Read how the device is, from /proc and /sys under a root, so that recorded trees replay."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from device_profiles.schema import Power
from edge_client.policy.decide import DeviceState
from edge_client.policy.owner import Policy
from edge_client.profile import battery_elsewhere
from edge_client.profile_linux import read_power, read_temperature_c, read_text
from edge_client.profile_network import read_link

LOAD_WINDOW_S = 10.0
"""What others use is a mean over so long."""
METERED_S = 30.0
"""How long to go by what was last heard about the network."""
NMCLI_TIMEOUT_S = 5.0
_USER, _NICE, _SYSTEM, _IDLE, _IOWAIT, _IRQ, _SOFTIRQ, _STEAL = range(8)


class Sensors:
    """Read what a policy asks of one device; `pids` are the processes that are not others'."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        pids: Callable[[], Iterable[int]] = lambda: (os.getpid(),),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._clock = root, clock
        self._load = OthersLoad(root, pids, clock)
        self._metered: tuple[float, bool | None] = (-METERED_S, None)

    def read(self, policy: Policy) -> DeviceState:
        """Return how the device is; what the policy does not ask for is left unknown."""
        root = self._root
        return DeviceState(
            power=_power(root) if policy.battery_above else Power(),
            temperature_c=read_temperature_c(root) if policy.temperature_below else None,
            others_load=self._load.read() if policy.idle_below else None,
            metered=self._is_metered() if policy.metered == "wait" else None,
        )

    def _is_metered(self) -> bool | None:
        now = self._clock()
        if now - self._metered[0] >= METERED_S:
            link = read_link(self._root, ask_s=NMCLI_TIMEOUT_S)
            self._metered = (now, link.metered if link else None)
        return self._metered[1]


class OthersLoad:
    """Measure what share of all cores others use: what is busy, less the own processes' part."""

    def __init__(
        self,
        root: Path,
        pids: Callable[[], Iterable[int]],
        clock: Callable[[], float],
        window_s: float = LOAD_WINDOW_S,
    ) -> None:
        self._root, self._pids, self._clock, self._window_s = root, pids, clock, window_s
        self._last: tuple[float, float, float, dict[int, float]] | None = None
        self._load: float | None = None

    def read(self) -> float | None:
        """Return the mean over the last whole window, 0 to 1; None where the system does not say.

        Before the first window is over it is the system's own mean over a minute.
        """
        now = self._clock()
        if self._last is not None and now - self._last[0] < self._window_s:
            return self._load
        times = _cpu_times(self._root)
        if times is None:
            return None
        busy, total = times
        own = {pid: used for pid in self._pids() if (used := _used(self._root, pid)) is not None}
        if self._last is None:
            self._load = _load_average(self._root)
        elif total > self._last[2]:
            ours = sum(used - self._last[3].get(pid, 0.0) for pid, used in own.items())
            share = (busy - self._last[1] - ours) / (total - self._last[2])
            self._load = min(1.0, max(0.0, share))
        self._last = (now, busy, total, own)
        return self._load


def _power(root: Path) -> Power:
    if root == Path("/") and platform.system() != "Linux":
        import psutil

        return battery_elsewhere(psutil.sensors_battery())
    return read_power(root)


def _cpu_times(root: Path) -> tuple[float, float] | None:
    """Return the time that all cores together were busy, and that there was, in clock ticks."""
    found = re.match(r"cpu +([\d ]+)", read_text(root / "proc/stat") or "")
    ticks = [float(number) for number in found[1].split()] if found else []
    if len(ticks) < _STEAL + 1:
        return None
    busy = sum(ticks[i] for i in (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ))
    return busy, busy + ticks[_IDLE] + ticks[_IOWAIT] + ticks[_STEAL]


def _used(root: Path, pid: int) -> float | None:
    """Return the clock ticks that a process has used; None where it has gone."""
    stat = read_text(root / "proc" / str(pid) / "stat") or ""
    fields = stat.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    try:
        return float(fields[11]) + float(fields[12])
    except (IndexError, ValueError):
        return None


def _load_average(root: Path) -> float | None:
    cores = len(re.findall(r"^cpu\d", read_text(root / "proc/stat") or "", re.MULTILINE))
    average = re.match(r"[\d.]+", read_text(root / "proc/loadavg") or "")
    return min(1.0, float(average[0]) / cores) if cores and average else None
