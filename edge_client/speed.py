"""How fast a way of training is: what its probe steps took, and what larger steps will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.memory import Probe


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of a micro-batch: `pass_s + tokens·token_s`."""

    pass_s: float
    token_s: float

    def tokens_s(self, tokens: int) -> float:
        """Return the tokens that are trained in a second, `tokens` at a time."""
        return tokens / (self.pass_s + tokens * self.token_s)


def fit_speed(probes: Sequence[Probe]) -> Speed:
    """Return the line through the two longest probes, neither part of it below 0.

    Where a longer step took more a token than a shorter one, by the load of others perhaps, all of
    it is taken to grow with the tokens.
    """
    short, long = sorted(probes, key=lambda p: p.tokens)[-2:]
    token_s = (long.seconds - short.seconds) / (long.tokens - short.tokens)
    pass_s = long.seconds - token_s * long.tokens
    if token_s <= 0 or pass_s < 0:
        return Speed(0.0, (long.seconds + short.seconds) / (long.tokens + short.tokens))
    return Speed(pass_s, token_s)
