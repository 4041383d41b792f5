"""What a process tells whoever started it: one event a line, as JSON or in words."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

SELDOM_S = 60.0
KEYS_KEPT = 4096


class EventLog:
    """Write events to a stream: JSON Lines for programs, `name key=value …` for people.

    `also` hears each event too.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        stream: TextIO | None = None,
        also: Callable[[Mapping[str, Any]], None] | None = None,
        **always: object,
    ) -> None:
        self.now: Callable[[], float] = time.time
        """Seconds since 1970, by which events are dated; a replay has a clock of its own."""
        self._also = also
        self._as_json = as_json
        self._stream = stream or sys.stdout
        self._always = always
        self._held: list[str] | None = None

    def emit(self, event: str, **fields: object) -> None:
        """Write one event; a reader that has gone away is no error."""
        record = {"event": event, "time": round(self.now(), 3), **self._always, **fields}
        if self._also is not None:
            self._also(record)
        self._say(record)

    def _say(self, record: Mapping[str, Any]) -> None:
        self._take(json.dumps(record) if self._as_json else self.in_words(record))

    @classmethod
    def in_words(cls, record: Mapping[str, Any]) -> str:
        """Return an event as people read it."""
        fields = (f"{k}={shown(v)}" for k, v in record.items() if k not in ("event", "time"))
        return f"{cls.clock(record['time'])} {record['event']:<12} {' '.join(fields)}"

    @staticmethod
    def clock(at: float) -> str:
        return time.strftime("%H:%M:%S", time.localtime(at))

    def _take(self, line: str) -> None:
        """Write a line, now or with those that are held."""
        if self._held is not None:
            self._held.append(line)
        else:
            self._write(line)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write what is emitted in the block when it has ended well, and nothing if it fails."""
        self._held = []
        try:
            yield
            lines = self._held
        finally:
            self._held = None
        if lines:
            self._write("\n".join(lines))

    def _write(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except ValueError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe's reader, a closed terminal
                raise


class Seldom:
    """Emit what others can cause as often as they like: at most once a minute for each key."""

    def __init__(self, events: EventLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._clock = clock
        self._quiet: dict[Hashable, tuple[float, int]] = {}
        """Key → until when it is quiet, and how many events have been left out since."""

    def emit(self, key: Hashable, event: str, **fields: object) -> bool:
        """Write an event, with the number of those left out before it; False when left out."""
        now = self._clock()
        until, left_out = self._quiet.get(key, (now, 0))
        if now < until:
            self._quiet[key] = until, left_out + 1
            return False
        if len(self._quiet) > KEYS_KEPT:
            self._quiet = {k: v for k, v in self._quiet.items() if now < v[0]}
        self._quiet[key] = now + SELDOM_S, 0
        self._events.emit(event, **fields, **({"left_out": left_out} if left_out else {}))
        return True


SENTENCES, ROW = 500, 120
"""How many characters of a text, and of a list or table, people are shown."""


def shown(value: object) -> str:
    """Return a value as people read it: short, and with no terminal sequence of its own."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    if not text.isprintable():  # a peer chose it: no line or terminal sequence of its own
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    most = SENTENCES if isinstance(value, str) else ROW  # what to do stands at a sentence's end
    return text if len(text) <= most else text[: most - 3] + "..."
