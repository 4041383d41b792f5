"""Adafactor of the moment, as `edge_client.trainer.adafactor` has it, in torch's backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edge_client.trainer.adafactor import LEAST_SQUARE


class TorchAdafactor(torch.optim.Optimizer):
    """Move each matrix as soon as its gradient is there, and let go of that (`moving`)."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.share = 1.0
        """The part of a step's rate that the next gradients move by."""

    @contextmanager
    def moving(self, press: Callable[[torch.Tensor], object]) -> Iterator[None]:
        """Move in every backward pass; `press` may first add to a parameter's gradient."""
        handles = [
            parameter.register_post_accumulate_grad_hook(self._mover(group, press))
            for group in self.param_groups
            for parameter in group["params"]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mover(
        self, group: dict[str, Any], press: Callable[[torch.Tensor], object]
    ) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def move(parameter: torch.Tensor) -> None:
            press(parameter)
            gradient, rate = parameter.grad, group["lr"] * self.share
            assert gradient is not None, "it has just come"
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(gradient, alpha=-rate / normalise(gradient))
            parameter.grad = None

        return move


def normalise(gradient: torch.Tensor) -> float:
    """Divide a gradient by the size of its rows and columns, in place; return max(1, its rms)."""
    rows = _mean_squares(gradient, 1)
    columns = _mean_squares(gradient, 0)
    gradient.mul_((rows.mean() / rows).sqrt_()[:, None])
    gradient.div_(columns.sqrt_())
    return max(1.0, float(torch.linalg.vector_norm(gradient)) / math.sqrt(gradient.numel()))


def _mean_squares(gradient: torch.Tensor, over: int) -> torch.Tensor:
    """Return the mean of squares over a dimension, without a matrix of squares."""
    norms: torch.Tensor = torch.linalg.vector_norm(gradient, dim=over)
    return norms.square_().div_(gradient.shape[over]).add_(LEAST_SQUARE)
