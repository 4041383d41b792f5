"""Waiting for what is not there yet, as a service does that starts at boot."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from protocol.errors import BrokerUnreachable
from protocol.events import EventLog

SELDOM_S = 600.0
LONGEST_PAUSE_S = 30.0
_GLANCE_S = 0.2


class Connecting(Protocol):
    """What connects to a broker; see protocol.transport.MqttTransport."""

    def connect(self, timeout_s: float = ..., stopping: Callable[[], bool] = ...) -> None: ...


class Waiting:
    """Say what is waited for: at first, when the reason is another one, and then seldom."""

    def __init__(self, events: EventLog) -> None:
        self.events = events
        self._said: tuple[str, str] = ("", "")
        self._next = 0.0

    def say(self, what: str, why: str) -> None:
        """Emit that `what` is waited for, unless that was said a short time ago."""
        now = time.monotonic()
        if (what, why) != self._said or now >= self._next:
            self.events.emit("waiting", what=what, why=why)
            self._said, self._next = (what, why), now + SELDOM_S


def connect_when_up(
    link: Connecting, waiting: Waiting, *, stopping: Callable[[], bool], wait: bool = True
) -> bool:
    """Connect, with growing pauses while nobody answers; return False when stopped before.

    Raises:
        BrokerUnreachable: nobody answers, and nobody wants to `wait`.
        TransportError: what waiting does not change, such as a certificate that is refused.
    """
    pause_s = 1.0
    while not stopping():
        try:
            link.connect(stopping=stopping)
            return True
        except BrokerUnreachable as error:
            if not wait:
                raise
            if not stopping():
                waiting.say(f"the broker at {error.address}", error.why)
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not stopping():
            time.sleep(_GLANCE_S)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return False
