"""A base with an adapter merged in, on torch, with the KV cache between steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from edge_client.exports.merge import merged


class TorchDecoder:
    """Implement `generate.Decoder` on transformers, in float32."""

    def __init__(self, base: Path, adapter: Path | None, threads: int) -> None:
        """Load the base, and merge the adapter in.

        Raises:
            ModelError: they can't be loaded, or don't fit each other.
        """
        torch.set_num_threads(threads)
        self.net: Any = merged(base, adapter)
        self._cache = DynamicCache()

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, and return the logits (vocabulary,) after the last."""
        last: NDArray[np.float32] = self.compute(ids)[-1]
        return last

    @torch.inference_mode()
    def compute(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, and return the logits (new, vocabulary) after each."""
        given = torch.tensor([list(ids)])  # (1, new)
        answer = self.net(input_ids=given, past_key_values=self._cache, use_cache=True)
        logits: NDArray[np.float32] = answer.logits[0].numpy()
        return logits

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not length:
            self._cache = DynamicCache()
        elif length < self._cache.get_seq_length():
            self._cache.crop(length)
