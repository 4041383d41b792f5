"""Which chunks of an upload are asked for: a window of them, more as they come.

A device sends what it is asked for, as fast as the broker takes it, and a broker that is killed
forgets what it took. So no more than a window is ever on its way from a device to the disk here.
It is half of what MQTT may have in flight, for the broker's death can cost it twice: what a device
sends again on connecting is lost too where the aggregator is not yet back.

Bookkeeping in memory, pure; where several processes take chunks in, in the store, for each sees but
some of an upload's. What is forgotten when the aggregator ends is asked for again when the device
offers its upload again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protocol.connecting import WINDOW
from protocol.database import Database

CHUNKS_AT_ONCE = WINDOW // 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS asked (
  device TEXT NOT NULL, upload TEXT NOT NULL, number INTEGER NOT NULL, waiting INTEGER NOT NULL,
  PRIMARY KEY (device, number)) STRICT;
"""


class Window(Protocol):
    """Ask each device for the chunks of its one upload."""

    def ask(self, device: str, upload: str, missing: Sequence[int]) -> list[int]: ...
    def arrived(self, device: str, upload: str, number: int) -> list[int]: ...


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


class StoredWindow:
    """Do as `ChunkWindow` in the store's database, whose transactions it is part of."""

    def __init__(self, db: Database, size: int = CHUNKS_AT_ONCE) -> None:
        self._db, self._size = db, size

    def ask(self, device: str, upload: str, missing: Sequence[int]) -> list[int]:
        """Begin, or begin again, with the chunks that are missing; return those to ask for now."""
        with self._db.transaction():
            self._db.run("DELETE FROM asked WHERE device = ?", device)
            for place, number in enumerate(missing):
                row = device, upload, number, int(place < self._size)
                self._db.run("INSERT INTO asked VALUES (?, ?, ?, ?)", *row)
        return list(missing[: self._size])

    def arrived(self, device: str, upload: str, number: int) -> list[int]:
        """Take note of a chunk that is committed; return those to ask for now, mostly none."""
        which = "device = ? AND upload = ?"
        with self._db.transaction():
            chunk = device, upload, number
            self._db.run(f"DELETE FROM asked WHERE {which} AND number = ?", *chunk)
            query = f"SELECT count(*) FROM asked WHERE {which} AND waiting"
            waiting = self._db.one(query, device, upload)
            if waiting is not None and waiting[0] > self._size // 2:
                return []
            query = (
                f"SELECT number FROM asked WHERE {which} AND NOT waiting ORDER BY number LIMIT ?"
            )
            more = [row[0] for row in self._db.rows(query, device, upload, self._size // 2)]
            for chosen in more:
                change = f"UPDATE asked SET waiting = 1 WHERE {which} AND number = ?"
                self._db.run(change, device, upload, chosen)
        return more
