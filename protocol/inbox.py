"""What came in and waits to be taken: between the network's thread and ours.

Bounded, so that a full inbox holds the broker up through TCP; the broker's own window can't be
relied on (Mosquitto 2.0.11 sends up to a whole window more for each message acknowledged). While
we wait for an answer of the broker, which comes behind what it has sent before, more is let in:
otherwise both would wait for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.link import Incoming

LIMIT = 256
"""Messages."""
WAITING_LIMIT_BYTES = 128 << 20
"""While an answer is waited for."""
UNASSURED_LIMIT = 32
"""Messages that wait when another comes that its sender left to luck (QoS 0, as nothing of ours is,
and not retained): it is let go, and holds nobody up."""
SWAMPED = 10_000
"""Messages let go, beside which Mosquitto may have dropped what it should not."""


class Inbox:
    """Hold messages in the order in which they came; `changed` is notified of each."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._messages: deque[Incoming] = deque()
        self._bytes = 0
        self._waiting = 0
        self._closed = False
        self._let_go = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Incoming) -> None:
        """Add a message, when there is room; a closed inbox forgets it."""
        with self._changed:
            unassured = not message.message_id and not message.retained
            if unassured and len(self._messages) >= UNASSURED_LIMIT:
                self._let_go += 1
                return
            self._changed.wait_for(lambda: self._closed or self._has_room())
            if not self._closed:
                self._messages.append(message)
                self._bytes += len(message.payload)
                self._changed.notify_all()

    def get(self, timeout_s: float) -> Incoming | None:
        """Return the next message; None if none came in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._messages, max(timeout_s, 0.0)):
                return None
            message = self._messages.popleft()
            self._bytes -= len(message.payload)
            self._changed.notify_all()
            return message

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let more in while the block runs, which waits for an answer and takes nothing out."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def swamped(self) -> bool:
        """Say, once, that many messages have been let go."""
        with self._changed:
            if self._let_go < SWAMPED:
                return False
            self._let_go = 0
            return True

    def close(self) -> None:
        """Let nobody wait for room any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        if self._waiting and self._bytes < WAITING_LIMIT_BYTES:
            return True
        return len(self._messages) < LIMIT
