"""Adapters that a device is given to try before it trains: which, in which order, how they did.

    its own adapter   it goes on with it, so its loss is what the others are compared with
    the trial         the same at another temperature: how far it should trust others
    candidates        other devices' adapters: whom it should trust

All are measured on the trust split, text that the device neither trains on nor reports losses of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from edge_client.download import Source
from protocol.bands import Band
from protocol.messages import LARGEST_LOSS, GlobalManifest, TrustLosses

SPLIT = "trust"
PATIENCE_TICKS = 60
"""The agent's ticks after which an adapter of which nothing comes is left out: half a minute."""


def to_try(
    heading: GlobalManifest, device: str, bands: Sequence[Band], byte_budget: float
) -> list[Source]:
    """Return what of a version a device tries: its trial first, then candidates.

    All are fetched in the bands that it holds, within what of `byte_budget`, the bytes of a
    version, the adapter it goes on with has left. The order of the candidates is drawn by each
    device for itself, so that together they try all of them: by the SHA-256 of
    "job|device|version|number|candidate".
    """

    def order(number: int) -> bytes:
        text = f"{heading.job}|{device}|{heading.version}|{number}|candidate"
        return hashlib.sha256(text.encode()).digest()

    there = [Source(heading.job, device, "trial", heading.version)]
    offered = there if device in heading.trials else []
    offered += [
        Source(heading.job, device, "candidate", heading.version, number)
        for number in sorted(range(heading.candidates), key=order)
    ]
    each = sum(heading.bands[band.name].bytes for band in bands)
    affords = max(0.0, byte_budget / max(each, 1) - 1)
    return offered[: int(min(affords, len(offered)))]


def can_be_told(loss: float) -> bool:
    """Say whether a loss is a number that the aggregator takes; NaN is none."""
    return 0 <= loss <= LARGEST_LOSS


class Trying:
    """Keep what is left to try of a version, and the losses found, in nats a token."""

    def __init__(
        self, version: int, left: Sequence[Source], *, received: float, own: float | None
    ) -> None:
        """`received` is the loss of the adapter gone on with, `own` of the last training's end."""
        self.version = version
        self.received = received
        self._own = own
        self._left = list(left)
        self._found: dict[Source, float] = {}

    @property
    def next(self) -> Source | None:
        return self._left[0] if self._left else None

    def found(self, loss: float) -> None:
        """Note the loss of the next one, which makes another the next."""
        self._found[self._left.pop(0)] = loss

    def skip(self) -> None:
        """Leave out the next one."""
        self._left.pop(0)

    def answer(self) -> TrustLosses | None:
        """Return what the aggregator is told; nothing if there is nothing to compare with."""
        if not can_be_told(self.received):
            return None
        trial = [loss for source, loss in self._found.items() if source.kind == "trial"]
        return TrustLosses(
            received=self.received,
            own=self._own,
            trial=trial[0] if trial else None,
            candidates={s.number: loss for s, loss in self._found.items() if s.kind == "candidate"},
        )
