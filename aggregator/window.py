"""Which chunks of an upload are asked for: a window of them, more as they come.

A device sends what it is asked for, as fast as the broker takes it, and a broker that is killed
forgets what it took. So no more than a window is ever on its way from a device to the disk here.
It is half of what MQTT may have in flight, for the broker's death can cost it twice: what a device
sends again on connecting is lost too where the aggregator is not yet back.

Bookkeeping in memory, pure. What it forgets when the aggregator ends is asked for again when the
device offers its upload again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.connecting import WINDOW

CHUNKS_AT_ONCE = WINDOW // 2


@dataclass(slots=True)
class _Asked:
    """Chunks of one upload."""

    upload: str
    waiting: set[int]
    later: deque[int]


@dataclass(slots=True)
class ChunkWindow:
    """Ask each device for the chunks of its one upload."""

    size: int = CHUNKS_AT_ONCE
    _asked: dict[str, _Asked] = field(default_factory=dict)
    """By device."""

    def ask(self, device: str, upload: str, missing: Sequence[int]) -> list[int]:
        """Begin, or begin again, with the chunks that are missing; return those to ask for now."""
        first = list(missing[: self.size])
        self._asked[device] = _Asked(upload, set(first), deque(missing[self.size :]))
        return first

    def arrived(self, device: str, upload: str, number: int) -> list[int]:
        """Take note of a chunk that is committed; return those to ask for now, mostly none.

        Half a window at once: so the device is busy with one half while it is asked for another.
        """
        asked = self._asked.get(device)
        if asked is None or asked.upload != upload:
            return []
        asked.waiting.discard(number)
        if len(asked.waiting) > self.size // 2:
            return []
        more = [asked.later.popleft() for _ in range(min(len(asked.later), self.size // 2))]
        asked.waiting.update(more)
        if not asked.waiting:
            del self._asked[device]
        return more
