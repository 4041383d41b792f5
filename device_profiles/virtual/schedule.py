"""Virtual time: what happens when, in an order that depends on nothing real.

Events are taken in the order of their time, of the device's number and of that device's own count.
So which of two devices a real broker has served first makes no difference.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

Action = Callable[[float], None]
"""Called with the virtual time at which it was due."""


class Event(NamedTuple):
    """What is to happen to a device; events are in order by their first three fields."""

    time_s: float
    device: int
    number: int
    """Which of the device's it is."""
    action: Action


class Schedule:
    """Hold what is to happen, in seconds of virtual time since the replay's start."""

    def __init__(self) -> None:
        self.floor = 0.0
        """Nothing happens before this any more: the aggregator has decided by then."""
        self._heap: list[Event] = []
        self._counts: Counter[int] = Counter()

    def at(self, time_s: float, device: int, action: Action) -> None:
        """Have something happen to a device."""
        self._counts[device] += 1
        heapq.heappush(self._heap, Event(time_s, device, self._counts[device], action))

    @property
    def next_s(self) -> float | None:
        """The time of what is next; None: nothing is to happen."""
        return self._heap[0].time_s if self._heap else None

    def take(self, until_s: float) -> Event | None:
        """Take out what is due next up to a time; None: nothing is."""
        if not self._heap or self._heap[0].time_s > until_s:
            return None
        return heapq.heappop(self._heap)

    def put_back(self, events: Iterable[Event]) -> None:
        """Have events happen after all, each in its old place."""
        for event in events:
            heapq.heappush(self._heap, event)
