"""What of today's share is used: counted here, kept in the outbox over restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from edge_client.outbox import Outbox
from edge_client.policy.decide import Used
from protocol.link import DeviceLink

KEPT_EVERY_S = 30.0
"""A kill forgets what was used in so long."""


class Usage:
    """Count bytes and seconds of training by the local day."""

    def __init__(
        self,
        outbox: Outbox,
        now: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox, self._now, self._clock = outbox, now, clock
        self._day = self._today()
        self._kept = Used(*outbox.used(self._day))
        self._bytes, self._training_s = 0, 0.0
        self._link_bytes = 0
        self._next = self._clock() + KEPT_EVERY_S

    def note_link(self, link: DeviceLink) -> None:
        """Note what has gone through the agent's link since that was made."""
        self.note_bytes(link.bytes_sent + link.bytes_received)

    def note_bytes(self, of_link: int) -> None:
        """Note what has gone through the agent's link since that was made, up and down together."""
        self._bytes += of_link - self._link_bytes
        self._link_bytes = of_link
        self._keep_seldom()

    def note_download(self, more: int) -> None:
        """Note bytes that came to this device by another way than the agent's link."""
        self._bytes += more
        self._keep_seldom()

    def note_training(self, seconds: float) -> None:
        self._training_s += seconds
        self._keep_seldom()

    def today(self) -> Used:
        if self._day != self._today():
            self.keep()
        return Used(self._kept.bytes + self._bytes, self._kept.training_s + self._training_s)

    def keep(self) -> None:
        """Write what is not in the outbox yet; go on with the day that it is now."""
        if self._bytes or self._training_s:
            self._outbox.use(self._day, bytes_more=self._bytes, training_more_s=self._training_s)
        self._bytes, self._training_s = 0, 0.0
        self._day = self._today()
        self._kept = Used(*self._outbox.used(self._day))
        self._next = self._clock() + KEPT_EVERY_S

    def _keep_seldom(self) -> None:
        if self._clock() >= self._next:
            self.keep()

    def _today(self) -> str:
        return self._now().date().isoformat()
