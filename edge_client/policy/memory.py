"""Training waits while memory is short: the device's other work comes first, the kernel last."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from edge_client.config import Settings
from edge_client.policy.decide import Reason
from edge_client.policy.senses import Senses
from edge_client.pressure import Pressure, Reading, read_pressure

LOOK_S = 1.0
"""What the kernel says is read as often at most; it averages stalls over 10 s itself."""


class ShortMemory:
    """A reason not to train now, while memory runs short under `root`.

    `taken_mib` says what the training process takes now. It ends when it is told to pause for this
    reason, and goes on where there is room for the most that it has taken.
    """

    def __init__(
        self,
        root: Path,
        taken_mib: Callable[[], float],
        *,
        read: Callable[[Path, float], Reading] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._taken_mib, self._read, self._clock = root, taken_mib, read, clock
        self._pressure = Pressure()
        self._looked, self._why = float("-inf"), ""

    @classmethod
    def of(cls, settings: Settings, senses: Senses) -> ShortMemory:
        """Look at what `senses` tell of memory."""
        return cls(
            settings.system_root,
            senses.taken_mib or training_mib,
            read=senses.pressure,
            clock=senses.clock,
        )

    def expect(self, needs_mib: float) -> None:
        """Go on where there is room for this much: another plan is trained by from now on."""
        self._pressure.needs_mib = needs_mib

    def __call__(self) -> Reason | None:
        """Return why training should wait, or None."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            if not self._why:
                self._pressure.needs_mib = max(self._pressure.needs_mib, self._taken_mib())
            self._why = self._pressure.take(self._read(self._root, now))
        if not self._why:
            return None
        return Reason("memory", f"{self._why}; until there is room", wants_memory=True)


def training_mib() -> float:
    """Return what the agent's training processes take now, resident."""
    total = 0
    for child in multiprocessing.active_children():
        with suppress(psutil.Error):
            total += psutil.Process(child.pid).memory_info().rss
    return total / 2**20
