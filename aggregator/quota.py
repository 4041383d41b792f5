"""How much one device may say and send, so that none can keep the aggregator from the others.

Bookkeeping in memory, pure: time is a parameter, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MESSAGES_BURST, MESSAGES_PER_S = 120.0, 2.0
"""Messages of a device but chunks that are expected: far more than one that follows the protocol
sends, and room for a window of chunks that no longer are, which were on their way."""
FILES_A_ROUND = 4
"""Times its own largest upload a device may send in a round: lost, broken and changed ones."""
KEYS_KEPT = 4096
Attempt = tuple[int, int]
"""A round's number, and its attempt."""


@dataclass(slots=True)
class Bucket:
    """A token bucket for each key: `burst` at once, `per_s` on and on."""

    burst: float = MESSAGES_BURST
    per_s: float = MESSAGES_PER_S
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Key → tokens left, and when."""

    def take(self, key: str, now: float) -> bool:
        """Take a token; False when there is none."""
        left, then = self._left.get(key, (self.burst, now))
        left = min(self.burst, left + max(0.0, now - then) * self.per_s)
        if len(self._left) > KEYS_KEPT:
            full_s = self.burst / self.per_s
            self._left = {k: v for k, v in self._left.items() if now - v[1] < full_s}
        self._left[key] = (left - 1 if left >= 1 else left, now)
        return left >= 1


@dataclass(slots=True)
class RoundBytes:
    """Bytes of chunks that each device has sent in one attempt at a round."""

    now: Attempt = (0, 0)
    _sent: dict[str, int] = field(default_factory=dict)

    def sent(self, device: str, now: Attempt) -> int:
        return self._sent.get(device, 0) if now == self.now else 0

    def add(self, device: str, now: Attempt, size: int) -> None:
        """Count bytes; a new attempt begins at nothing."""
        if now != self.now:
            self.now, self._sent = now, {}
        self._sent[device] = self._sent.get(device, 0) + size
