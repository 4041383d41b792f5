"""Virtual time: what happens when, in an order that depends on nothing real.

Events are taken in the order of their time, of the device's number and of that device's own count.
So which of two devices a real broker has served first makes no difference.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable

Action = Callable[[float], None]
"""Called with the virtual time at which it was due."""


class Schedule:
    """Hold what is to happen, in seconds of virtual time since the replay's start."""

    def __init__(self) -> None:
        self.floor = 0.0
        """Nothing happens before this any more: the aggregator has decided by then."""
        self._heap: list[tuple[float, int, int, Action]] = []
        self._counts: Counter[int] = Counter()

    def at(self, time_s: float, device: int, action: Action) -> None:
        """Have something happen to a device."""
        self._counts[device] += 1
        heapq.heappush(self._heap, (time_s, device, self._counts[device], action))

    @property
    def next_s(self) -> float | None:
        """The time of what is next; None: nothing is to happen."""
        return self._heap[0][0] if self._heap else None

    def take(self, until_s: float) -> tuple[int, float, Action] | None:
        """Take out what is due next up to a time: the device, when, what; None: nothing is."""
        if not self._heap or self._heap[0][0] > until_s:
            return None
        time_s, device, _, action = heapq.heappop(self._heap)
        return device, time_s, action
