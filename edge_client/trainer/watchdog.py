"""Hold the training process to the owner's cap where no kernel does: end it when it gets there."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from edge_client.memory import MIB

EVERY_S = 0.02


class Watchdog:
    """Watch one process from a thread, until it has ended or `stop` is called.

    `reading`: the base is being read, through pages of its file that the kernel takes back when it
    wants them. Then only what is not a file's counts.
    """

    def __init__(self, pid: int, limit_mib: float) -> None:
        self._pid, self._limit_mib = pid, limit_mib
        self._stopping = threading.Event()
        self.reading = False
        self.killed_at_mib: float | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no more: the process may be gone, and its number another's."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(EVERY_S):
            mib = resident_mib(self._pid, files=not self.reading)
            if mib is None:
                return
            if mib >= self._limit_mib:
                self.killed_at_mib = mib
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                return


def resident_mib(pid: int, *, files: bool = True) -> float | None:
    """Return what a process has in memory, without pages of `files` if so told; None: it is gone.

    Only Linux tells files' pages apart.
    """
    try:
        if sys.platform == "linux":
            _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
            pages = int(resident) if files else int(resident) - int(shared)
            return pages * os.sysconf("SC_PAGESIZE") / MIB
        return float(psutil.Process(pid).memory_info().rss) / MIB
    except (OSError, ValueError, psutil.Error):
        return None
