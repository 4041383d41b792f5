"""Telling a process from another that had its number, or will."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")


def began(pid: int) -> str | float:
    """Return what tells a process from another that had its number, or will.

    On Linux the boot and the clock ticks since then (proc(5)): the time of day at which a process
    began moves when the clock is set, as it is on a board without a battery after each start.

    Raises:
        OSError, psutil.Error: there is no such process.
    """
    if not sys.platform.startswith("linux"):
        return float(psutil.Process(pid).create_time())
    stat = Path(f"/proc/{int(pid)}/stat").read_bytes()
    ticks = stat.rpartition(b")")[2].split()[19]  # the 22nd; the name before may hold anything
    return f"{BOOT.read_text().strip()}/{int(ticks)}"


def is_alive(pid: object, begun: object) -> bool:
    """Say whether the process that once said this of itself still runs."""
    try:
        return isinstance(pid, int) and bool(began(pid) == begun)
    except (ValueError, OverflowError, OSError, psutil.Error):
        return False
