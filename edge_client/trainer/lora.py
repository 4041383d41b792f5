"""A frozen linear module with LoRA beside it, which keeps for the backward pass what it must.

    y = W·x + b + s·B·(A·x) + s·B_f·(A_f·x)

A (r, d_in) and B (d_out, r) are trained, in float32; A_f and B_f are the frozen remainder, in the
dtype of x. Of its input it keeps x itself, which modules that read the same x share, and A·x (r
numbers a token): no copy of x in another dtype, nothing of W and nothing of the remainder, whose
gradients are products with what is there anyway (Hu et al., arXiv 2106.09685, for the sum).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from protocol.adapter import Factors


class LoraLinear:
    """Take over the forward pass of `module`, an nn.Linear or a Conv1D of transformers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._turned = not isinstance(module, nn.Linear)  # Conv1D's weight is (d_in, d_out)
        self.scale = 1.0
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.frozen: tuple[torch.Tensor, torch.Tensor] | None = None
        """A_f, and s·B_f."""
        module.forward = self.forward

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W (d_out, d_in) in the dtype of the activations."""
        weight: torch.Tensor = self._module.weight  # type: ignore[assignment]
        return (weight.t() if self._turned else weight).to(dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._module.bias  # type: ignore[assignment]
        return None if bias is None else bias.to(dtype)

    def train(self, factors: Factors | None, scale: float) -> None:
        """Take what is to be trained, or nothing."""
        self.scale = scale
        self.a = self.b = None
        if factors is not None and factors.rank:
            self.a = torch.tensor(factors.a, dtype=torch.float32, requires_grad=True)
            self.b = torch.tensor(factors.b, dtype=torch.float32, requires_grad=True)

    def freeze(self, factors: Factors | None, scale: float, dtype: torch.dtype) -> None:
        """Take the frozen remainder, or nothing."""
        self.frozen = None
        if factors is not None and factors.rank:
            a, b = torch.tensor(factors.a), torch.tensor(factors.b)
            self.frozen = a.to(dtype), b.mul_(scale).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (…, d_out) of x (…, d_in)."""
        y: torch.Tensor = _Apply.apply(self, x, None, self.a, self.b)  # type: ignore[no-untyped-call]
        return y

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return y of x = silu(gate)·up, which is made again in the backward pass."""
        y: torch.Tensor = _Apply.apply(self, gate, up, self.a, self.b)  # type: ignore[no-untyped-call]
        return y

    def _apply(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return y (n, d_out) and A·x (n, r) of rows (n, d_in)."""
        dtype, inner = rows.dtype, None
        y = functional.linear(rows, self.weight(dtype), self.bias(dtype))
        if self.a is not None and self.b is not None:
            inner = rows @ self.a.to(dtype).t()
            y.addmm_(inner, self.b.to(dtype).t(), alpha=self.scale)
        if self.frozen is not None:
            y.addmm_(rows @ self.frozen[0].t(), self.frozen[1].t())
        return y, inner

    def _input_gradient(self, dy: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient (n, d_in) from those of y (n, d_out) and of A·x (n, r)."""
        dx = dy @ self.weight(dy.dtype)
        if self.a is not None and inner is not None:
            dx.addmm_(inner, self.a.to(dy.dtype))
        if self.frozen is not None:
            dx.addmm_(dy @ self.frozen[1], self.frozen[0])
        return dx


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: LoraLinear,
        x: torch.Tensor,
        up: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> torch.Tensor:
        shape = x.shape[:-1]
        whole = x if up is None else functional.silu(x).mul_(up)
        y, inner = layer._apply(whole.reshape(-1, whole.shape[-1]))
        trains_a, trains_b = ctx.needs_input_grad[3:]
        # The input is needed for A's gradient; gate and up for their own besides.
        kept = x if trains_a or up is not None else None
        ctx.layer = layer
        ctx.save_for_backward(kept, up, inner if trains_b else None)
        return y.view(*shape, y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: LoraLinear = ctx.layer
        x, up, inner = ctx.saved_tensors
        _, takes_x, takes_up, trains_a, trains_b = ctx.needs_input_grad
        shape = grads[0].shape[:-1]
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        silu = None if up is None else functional.silu(x)
        d_inner = d_a = d_b = dx = d_up = None
        if layer.b is not None:
            d_inner = (dy @ layer.b.to(dy.dtype)).mul_(layer.scale)
        if trains_a and d_inner is not None:
            whole = x if silu is None else silu * up
            d_a = (d_inner.t() @ whole.reshape(-1, whole.shape[-1])).float()
        if trains_b:
            d_b = (dy.t() @ inner).float().mul_(layer.scale)
        if takes_x or takes_up:
            dx = layer._input_gradient(dy, d_inner)
            dx = dx.view(*shape, dx.shape[-1])
        if silu is not None and dx is not None:
            d_up = silu.mul_(dx)
            dx = torch.ops.aten.silu_backward(dx.mul_(up), x)
        return None, dx, d_up, d_a, d_b
