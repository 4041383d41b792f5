"""Cheaper forms of what most families' blocks are made of, taken where they compute the same.

A part of a block that looks like one of those here is tried: on random input both forms must give
the same. One that differs, or that only looks different, stays as transformers has it. What is won
is passes over memory, and activations that need not be kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edge_client.trainer.lora import LoraLinear

TRIED_TOKENS = 16
TRIED_SIZE = 3.0
"""Standard deviation of the random input: attention must be far from uniform to be told apart."""
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far both forms may be apart, as a share of the norm."""

Forward = Callable[..., Any]


def speed_up(model: nn.Module, layers: Mapping[str, LoraLinear], dtype: torch.dtype) -> None:
    """Give the parts of a model their cheaper forms; `layers` are its adapted modules by name.

    `dtype` is that of the activations.
    """
    for name, module in model.named_modules():
        parts = {
            child: layers[path]
            for child, _ in module.named_children()
            if (path := f"{name}.{child}") in layers
        }
        for is_like, make, trial in _FORMS:
            # Each is tried: families differ from block to block, in some without rotary positions.
            if is_like(module, parts) and trial(module, forward := make(module, parts), dtype):
                module.forward = forward


def checkpoint_blocks(blocks: nn.ModuleList, count: int) -> None:
    """Have the first `count` blocks keep their input alone and make the rest again.

    The last blocks come first in the backward pass: what they have kept is free again by the time
    the first ones are made again (Chen et al., arXiv 1604.06174, for the exchange).
    """
    for index, block in enumerate(blocks):
        plain = type(block).forward.__get__(block)
        block.forward = partial(_checkpointed, block, plain) if index < count else plain


def _checkpointed(block: nn.Module, plain: Forward, *args: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return plain(*args, **named)
    # Nothing in a block is drawn: there is no state of a generator to keep.
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **named)


# -- root mean square norm -------------------------------------------------------------------------


class _RootMeanSquare(torch.autograd.Function):
    """x·w / √(mean(x²) + ε), which keeps x and one number a row (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        unit: torch.Tensor = x * inverse  # float32
        return unit.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse  # float32
        dy = grads[0] * weight
        along = (unit * dy).mean(dim=-1, keepdim=True)
        dx = unit.mul_(along).neg_().add_(dy).mul_(inverse)
        return dx.to(x.dtype), None, None


def _is_norm(module: nn.Module, parts: Mapping[str, LoraLinear]) -> bool:
    weights = [p.shape for p in module.parameters(recurse=False)]
    named = type(module).__name__.endswith("RMSNorm")
    return named and len(weights) == 1 and hasattr(module, "weight")


def _norm(module: Any, parts: Mapping[str, LoraLinear]) -> Forward:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)) or 1e-6

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _RootMeanSquare.apply(x, module.weight, eps)  # type: ignore[no-untyped-call]
        return y

    return forward


@torch.no_grad()
def _norm_trial(module: Any, forward: Forward, dtype: torch.dtype) -> bool:
    x = _random(1, TRIED_TOKENS, module.weight.shape[0])
    # Of small numbers the epsilon shows.
    tried = (x.to(dtype), (1e-3 * x).to(dtype))
    return all(_agree(module.forward(some), forward(some)) for some in tried)


# -- gated feed-forward ----------------------------------------------------------------------------


def _is_gated(module: nn.Module, parts: Mapping[str, LoraLinear]) -> bool:
    return set(parts) == {"gate_proj", "up_proj", "down_proj"}


def _gated(module: Any, parts: Mapping[str, LoraLinear]) -> Forward:
    gate, up, down = (parts[f"{name}_proj"] for name in ("gate", "up", "down"))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down.gated(gate.forward(x), up.forward(x))

    return forward


@torch.no_grad()
def _gated_trial(module: Any, forward: Forward, dtype: torch.dtype) -> bool:
    x = _random(1, TRIED_TOKENS, module.gate_proj.weight.shape[1]).to(dtype)
    return _agree(module.forward(x), forward(x))


# -- attention with rotary positions ---------------------------------------------------------------


class _Rotate(torch.autograd.Function):
    """Turn pairs (i, i + d/2) of x (B, S, heads, d) by angles with `cos` and `sin` (B, S, d).

    Both have their second half equal to the first (Su et al., arXiv 2104.09864, in the order of
    GPT-NeoX). The gradient is turned back.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    y = x * cos[:, :, None]
    sin = sin[:, :, None, :half]
    y[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return y


def _is_attention(module: nn.Module, parts: Mapping[str, LoraLinear]) -> bool:
    children = {name for name, _ in module.named_children()}
    return (
        set(parts) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and children - {"rotary_emb"} == set(parts)
        and hasattr(module, "head_dim")
        and hasattr(module, "scaling")
    )


def _attention(module: Any, parts: Mapping[str, LoraLinear]) -> Forward:
    q_proj, k_proj, v_proj, o_proj = (parts[f"{name}_proj"] for name in "qkvo")

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        heads = (*hidden_states.shape[:2], -1, module.head_dim)
        q = _Rotate.apply(q_proj.forward(hidden_states).view(heads), *position_embeddings)  # type: ignore[no-untyped-call]
        k = _Rotate.apply(k_proj.forward(hidden_states).view(heads), *position_embeddings)  # type: ignore[no-untyped-call]
        v = v_proj.forward(hidden_states).view(heads)
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=module.scaling,
            enable_gqa=True,
        )
        return o_proj.forward(mixed.transpose(1, 2).flatten(2)), None

    return forward


@torch.no_grad()
def _attention_trial(module: Any, forward: Forward, dtype: torch.dtype) -> bool:
    x = _random(1, TRIED_TOKENS, module.q_proj.weight.shape[1]).to(dtype)
    angles = _random(1, TRIED_TOKENS, module.head_dim // 2).repeat(1, 1, 2)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    hidden = torch.ones(TRIED_TOKENS, TRIED_TOKENS, dtype=torch.bool).triu(1)
    hidden[TRIED_TOKENS // 2 :, : TRIED_TOKENS // 3] = True
    mask = torch.zeros(1, 1, *hidden.shape, dtype=dtype).masked_fill_(
        hidden, torch.finfo(dtype).min
    )
    for given in (None, mask):
        inputs = {"hidden_states": x, "position_embeddings": turns, "attention_mask": given}
        try:
            theirs = module.forward(**inputs)
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return False  # it takes something else
        if len(theirs) != 2 or not _agree(theirs[0], forward(**inputs)[0]):
            return False
    return True


# -- trying ----------------------------------------------------------------------------------------

_FORMS = (
    (_is_norm, _norm, _norm_trial),
    (_is_gated, _gated, _gated_trial),
    (_is_attention, _attention, _attention_trial),
)


def _random(*shape: int) -> torch.Tensor:
    return TRIED_SIZE * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _agree(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    apart = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return bool(apart < AGREEMENT[theirs.dtype])
