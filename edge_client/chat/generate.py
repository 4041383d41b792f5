"""Draw tokens one after the other, from whatever computes the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import ModelError

CHUNK = 64
"""Tokens of a prompt that are computed at once: logits (CHUNK, vocabulary) of more weigh much."""

Choose = Callable[[NDArray[np.float32]], int]
"""Logits (vocabulary,) → the next token."""


class Decoder(Protocol):
    """Compute a model on a text that grows, keeping what it has computed."""

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append at least one token, and return the logits (vocabulary,) after the last."""

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class Stopped(Exception):
    """What is being answered was stopped before it was whole."""


class Reading:
    """Hold what a decoder has read, so that of a longer text it reads the rest alone."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self.stopped = False
        """Set it, from a signal's handler too, and the next step raises Stopped."""

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read a text of at least one token, and return the logits after it."""
        pairs = zip(self._ids, ids[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._decoder.keep(same)
        self._ids = list(ids[:same])
        for start in range(same, len(ids), CHUNK):
            logits = self.more(ids[start : start + CHUNK])
        return logits

    def forget(self) -> None:
        """Begin anew."""
        self._decoder.keep(0)
        self._ids = []

    def more(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read on, and return the logits after that.

        Raises:
            ModelError: they are no numbers.
            Stopped: somebody wants no more.
        """
        if self.stopped:
            raise Stopped
        logits = self._decoder.feed(ids)
        self._ids += ids
        if not np.isfinite(logits.max()):
            raise ModelError("the model's output is not a number: the model or adapter is broken")
        return logits


def generate(
    reading: Reading, prompt: Sequence[int], choose: Choose, stops: Collection[int], most: int
) -> Iterator[int]:
    """Yield at most `most` tokens after a prompt, up to one that stops it, which is left out."""
    logits = reading.read(prompt)
    for drawn in range(1, most + 1):
        token = choose(logits)
        if token in stops:
            return
        yield token
        if drawn < most:
            logits = reading.more([token])


def chooser(temperature: float, top_p: float, seed: int | None) -> Choose:
    """Return how the next token is drawn.

    p = softmax(logits / temperature), of which the fewest likeliest tokens that have `top_p` of the
    whole are left (nucleus sampling, arXiv 1904.09751). Temperature 0 takes the likeliest.
    """
    rng = np.random.default_rng(seed)

    def draw(logits: NDArray[np.float32]) -> int:
        if temperature <= 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / temperature
        order = np.argsort(-scaled, kind="stable")
        weights = np.exp(scaled[order])
        total = np.cumsum(weights) / weights.sum()
        some = int(np.searchsorted(total, top_p)) + 1
        left = weights[:some] / weights[:some].sum()
        return int(order[rng.choice(len(left), p=left)])

    return draw
