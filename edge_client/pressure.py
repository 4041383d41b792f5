"""Tell when training should pause because memory runs short, before the kernel ends a process.

The kernel says how much of the time tasks stood still for want of memory (PSI), for the machine and
for a cgroup, and how much memory is available. What it says is read under a root folder, so that
recorded trees replay; what follows from it is decided by `Pressure`, which is pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edge_client.profile_linux import read_int, read_memory, read_text

SOME_HIGH, FULL_HIGH = 20.0, 5.0
"""Share of the last 10 s, in per cent, in which some or all tasks stood still: above it, pause."""
SOME_LOW, FULL_LOW = 5.0, 1.0
"""Below both, and only then, training may go on."""
LOW_MIB, LOW_SHARE = 48.0, 0.03
"""Less available than the larger of the two: pause. Twice as much: go on."""
SOON_S = 15.0
"""Memory that would be gone sooner, at the rate at which it falls: pause."""
CALM_S = 20.0
"""How long all has to be well before training goes on."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the kernel says now; `None` where it does not."""

    at_s: float
    """A clock's time that does not jump."""
    total_mib: float | None = None
    available_mib: float | None = None
    """The less of what the machine and the cgroup have left."""
    some_percent: float | None = None
    full_percent: float | None = None
    """The worst of machine and cgroup, over 10 s."""


class Pressure:
    """Decide whether to pause, from one reading after another.

    `needs_mib` is what training takes again when it goes on: while it stands still its activations
    are given back, so what is available then is not there for somebody else.
    """

    def __init__(self, needs_mib: float = 0.0) -> None:
        self.needs_mib = needs_mib
        self._before: Reading | None = None
        self._why = ""
        self._calm_since: float | None = None

    def take(self, now: Reading) -> str:
        """Return why training should not go on now, in words; empty where it may."""
        before, self._before = self._before, now
        if why := reason_to_pause(before, now):
            self._why, self._calm_since = why, None
        elif self._why:
            if not is_calm(now, self.needs_mib):
                self._calm_since = None
            elif self._calm_since is None:
                self._calm_since = now.at_s
            elif now.at_s - self._calm_since >= CALM_S:
                self._why = ""
        return self._why


def reason_to_pause(before: Reading | None, now: Reading) -> str:
    """Return why memory is short now, empty where it is not."""
    if now.full_percent is not None and now.full_percent >= FULL_HIGH:
        return f"memory is short: everything stood still {now.full_percent:.0f} % of the last 10 s"
    if now.some_percent is not None and now.some_percent >= SOME_HIGH:
        return f"memory is short: tasks stood still {now.some_percent:.0f} % of the last 10 s"
    if now.available_mib is None:
        return ""
    low_mib = _low_mib(now)
    if now.available_mib < low_mib:
        return f"memory is short: {now.available_mib:.0f} MiB available"
    if before is None or before.available_mib is None or now.at_s <= before.at_s:
        return ""
    falls_mib_s = (before.available_mib - now.available_mib) / (now.at_s - before.at_s)
    left_mib = now.available_mib - low_mib
    # A step takes and gives back memory all the time: only what little is left makes a fall matter.
    if falls_mib_s > 0 and left_mib < 2 * low_mib and left_mib / falls_mib_s < SOON_S:
        return (
            f"memory is running out: {now.available_mib:.0f} MiB available, "
            f"{falls_mib_s:.0f} MiB less each second"
        )
    return ""


def is_calm(now: Reading, needs_mib: float) -> bool:
    """Say whether there is room again; what is not known is no reason against it."""
    return (
        (now.full_percent is None or now.full_percent < FULL_LOW)
        and (now.some_percent is None or now.some_percent < SOME_LOW)
        and (now.available_mib is None or now.available_mib >= 2 * _low_mib(now) + needs_mib)
    )


def _low_mib(now: Reading) -> float:
    return max(LOW_MIB, LOW_SHARE * (now.total_mib or 0.0))


def read_pressure(root: Path, at_s: float) -> Reading:
    """Read what the kernel says under `root` ("/" for this device); what it does not is `None`."""
    memory = read_memory(root)
    groups = list(memory_groups(root))
    left = [memory.available_mib, *(left_mib(group) for group in groups)]
    known = [mib for mib in left if mib is not None]
    files = [root / "proc/pressure/memory", *(group / "memory.pressure" for group in groups)]
    stalls = [_stalls(read_text(path) or "") for path in files]
    has_mib = [mib for mib in (memory.total_mib, memory.limit_mib) if mib is not None]
    return Reading(
        at_s,
        min(has_mib, default=None),
        min(known, default=None),
        max((s["some"] for s in stalls if "some" in s), default=None),
        max((s["full"] for s in stalls if "full" in s), default=None),
    )


def memory_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory cgroup and of those above it, of v1 and v2."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3 or (fields[1] and "memory" not in fields[1].split(",")):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if fields[1] else "")
        parts = [part for part in PurePosixPath(fields[2]).parts if part not in ("/", "..")]
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def left_mib(group: Path) -> float | None:
    """Return what a cgroup has left below its limit, the cache it would give back included."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for limit_name, usage_name in names:
        limit, usage = read_int(group / limit_name), read_int(group / usage_name)
        if limit is None or usage is None or limit >= 1 << 60:
            continue
        stat = read_text(group / "memory.stat") or ""
        found = re.search(r"^(?:total_)?inactive_file ([0-9]{1,18})$", stat, re.M)
        return max(0, limit - usage + (int(found[1]) if found else 0)) / (1 << 20)
    return None


def _stalls(text: str) -> dict[str, float]:
    """Return the shares of the last 10 s, in per cent, of a PSI file's lines."""
    found = re.findall(r"^(some|full) avg10=([0-9]{1,3}(?:\.[0-9]+)?)", text, re.M)
    return {kind: float(share) for kind, share in found}
