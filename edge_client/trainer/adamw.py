"""AdamW on the factors of an adapter, in numpy, as torch.optim.AdamW does it.

Arrays are changed in place, one factor at a time: beside them lie Adam's two moments and what one
factor's update takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.99), 1e-8
CLIP_EPSILON = 1e-6


class AdamW:
    """Hold the moments of named arrays; Resumable (Loshchilov and Hutter, arXiv 1711.05101)."""

    def __init__(self, parameters: Mapping[str, FloatArray], *, weight_decay: float) -> None:
        self._parameters = parameters
        self._weight_decay = weight_decay
        self._steps = 0
        self._moments = {
            name: (np.zeros_like(value), np.zeros_like(value)) for name, value in parameters.items()
        }

    def step(self, gradients: Mapping[str, FloatArray], rates: Mapping[str, float]) -> None:
        """Move each array against its gradient at its own learning rate.

        m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← (1−ηλ)p − η·m̂/(√v̂ + ε)
        """
        self._steps += 1
        (beta, beta_squares), steps = ADAM_BETAS, self._steps
        correction, correction_squares = 1 - beta**steps, 1 - beta_squares**steps
        for name, value in self._parameters.items():
            gradient, rate = gradients[name], rates[name]
            mean, square = self._moments[name]
            value *= 1 - rate * self._weight_decay
            mean += (1 - beta) * (gradient - mean)
            square *= beta_squares
            square += (1 - beta_squares) * np.square(gradient)
            size = np.sqrt(square)
            size /= np.sqrt(correction_squares)
            size += ADAM_EPSILON
            value -= (rate / correction) * (mean / size)

    def arrays(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {"steps": np.array([self._steps])}
        for name, value in self._parameters.items():
            mean, square = self._moments[name]
            found |= {f"factor.{name}": value, f"mean.{name}": mean, f"square.{name}": square}
        return found

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        mine = self.arrays()
        if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in mine.items()}:
            return False
        self._steps = int(arrays["steps"][0])
        for name, value in mine.items():
            value[...] = arrays[name]
        return True


def clip(gradients: Mapping[str, FloatArray], norm: float) -> None:
    """Scale all gradients, in place, so that their norm as one vector is at most `norm`."""
    squares = sum(float(np.vdot(g, g)) for g in gradients.values())
    scale = norm / (np.sqrt(squares) + CLIP_EPSILON)
    if scale < 1:
        for gradient in gradients.values():
            gradient *= np.float32(scale)
