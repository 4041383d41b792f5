"""Adafactor of the moment on the factors of an adapter, in numpy: it keeps no state.

Adam divides a gradient by what each number's gradients have been like; Adafactor (Shazeer and
Stern, arXiv 1804.04235) by what those of its row and its column are like, which takes as many
numbers as a matrix has rows and columns. Here they are those of the moment, so that nothing is kept
(docs/algorithms.md, optimiser):

    U_ij = G_ij · √(mean r) / √(r_i·c_j)     r, c: means of G² over each row and each column
    X ← X − rate · U / max(1, rms(U))

So a gradient can be used as soon as it is there, and is gone before the next comes: a step does not
add up those of its micro-batches, but moves by each, by the micro-batch's share of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
LEAST_SQUARE = 1e-30
"""What means of squares have added: a row without gradients stays where it is."""


class Adafactor:
    """Move named arrays; Resumable."""

    def __init__(self, parameters: Mapping[str, FloatArray], *, weight_decay: float) -> None:
        self._parameters = parameters
        self._weight_decay = weight_decay

    def step(self, gradients: Mapping[str, FloatArray], rates: Mapping[str, float]) -> None:
        """Move each array by its gradient, which is used up, at its rate."""
        for name, value in self._parameters.items():
            gradient, rate = gradients[name], rates[name]
            value *= 1 - rate * self._weight_decay
            gradient *= np.float32(rate / normalise(gradient))
            value -= gradient

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"factor.{name}": value for name, value in self._parameters.items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        mine = self.arrays()
        if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in mine.items()}:
            return False
        for name, value in mine.items():
            value[...] = arrays[name]
        return True


def normalise(gradient: FloatArray) -> float:
    """Divide a gradient by the size of its rows and columns, in place; return max(1, its rms)."""
    rows = np.einsum("ij,ij->i", gradient, gradient) / gradient.shape[1] + LEAST_SQUARE
    columns = np.einsum("ij,ij->j", gradient, gradient) / gradient.shape[0] + LEAST_SQUARE
    gradient *= np.sqrt(rows.mean() / rows)[:, None].astype(np.float32)
    gradient /= np.sqrt(columns).astype(np.float32)
    return max(1.0, float(np.sqrt(np.vdot(gradient, gradient) / gradient.size)))
