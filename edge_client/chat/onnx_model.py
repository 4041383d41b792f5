"""An exported graph on ONNX Runtime, with the KV cache between steps; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.chat.providers import Candidate, Opened, open_graph
from edge_client.errors import ModelError
from protocol.errors import os_words

PAST, PRESENT, LOGITS = "past_key_values", "present", "logits"
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


class OnnxDecoder:
    """Implement `generate.Decoder` on a graph as optimum exports it."""

    def __init__(self, graph: Path, candidates: Sequence[Candidate], threads: int) -> None:
        """Open the graph with the first provider that can.

        Raises:
            ModelError: none can, or it is not such a graph.
        """
        self.opened: Opened = open_graph(graph, candidates, threads)
        session = self.opened.session
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith(f"{PAST}.")]
        self._outputs = [LOGITS, *(name.replace(PAST, PRESENT, 1) for name in self._past)]
        known = {IDS, MASK, POSITIONS, *self._past}
        there = {value.name for value in session.get_outputs()}
        if not self._past or set(self._inputs) - known or set(self._outputs) - there:
            raise ModelError(
                f"{graph} is no graph of a model with a KV cache as edge-client export writes it"
            )
        self._length = 0
        self._axis = self._growing_axis()
        self._cache = {name: self._empty(name) for name in self._past}

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, and return the logits (vocabulary,) after the last.

        Raises:
            ModelError: as `compute`.
        """
        last: NDArray[np.float32] = self.compute(ids)[-1]
        return last

    def compute(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, and return the logits (new, vocabulary) after each.

        Raises:
            ModelError: ONNX Runtime can't compute it.
        """
        stop = self._length + len(ids)
        known: dict[str, NDArray[Any]] = {
            IDS: np.asarray([ids], np.int64),  # (1, new)
            MASK: np.ones((1, stop), np.int64),
            POSITIONS: np.arange(self._length, stop, dtype=np.int64)[None],
        }
        feeds = {name: known[name] for name in self._inputs if name in known} | self._cache
        try:
            logits, *cache = self.opened.session.run(self._outputs, feeds)
        except Exception as error:  # the library's errors have no common kind
            raise ModelError(f"ONNX Runtime can't compute the model: {os_words(error)}") from None
        self._cache = dict(zip(self._past, cache, strict=True))
        self._length = stop
        return np.asarray(logits[0], np.float32)

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length < self._length:
            part = (slice(None),) * self._axis + (slice(length),)
            self._cache = {n: np.ascontiguousarray(v[part]) for n, v in self._cache.items()}
            self._length = length

    def _growing_axis(self) -> int:
        """Return the axis of the cache that tokens lie along: the second that has no fixed size."""
        shape = self._inputs[self._past[0]].shape
        free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        if len(free) != 2:
            raise ModelError(f"the cache of the exported graph has another form: {shape}")
        return free[1]

    def _empty(self, name: str) -> NDArray[Any]:
        """Return the cache (1, heads, 0, d) of no tokens."""
        value = self._inputs[name]
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        shape[self._axis] = 0
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        return np.zeros(shape, kind)
