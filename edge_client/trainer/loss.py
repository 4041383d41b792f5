"""Cross-entropy over a vocabulary, a chunk of positions at a time.

The logits of a batch (tokens, vocabulary) are often its largest tensor. The output head is frozen,
so the gradient with respect to the hidden states is known as soon as a chunk's logits are: both
are computed in the forward pass, and no more than one chunk of logits ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CHUNK_TOKENS = 128
"""Fewer read the head's weight too often, more hold more logits."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        counted = (labels >= 0).nonzero()[:, 0]
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32)
        for rows in counted.split(CHUNK_TOKENS):
            target = labels[rows, None]
            logits = hidden[rows] @ weight.T  # (chunk, vocabulary)
            largest = logits.amax(-1, keepdim=True).float()
            terms = logits.sub_(largest) if logits.dtype == torch.float32 else logits - largest
            del logits
            picked = terms.gather(1, target)
            whole = terms.exp_().sum(-1, keepdim=True)
            loss = whole.log() - picked
            total += loss.sum()
            if gradient is not None:
                # d loss / d logits = softmax − one-hot, here times Σ exp(z); exact where the
                # target's chance is nearly 1
                terms.scatter_(1, target, torch.expm1(-loss) * whole)
                gradient[rows] = (terms.to(weight.dtype) @ weight).div_(whole)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed loss in nats of `hidden` (n, d) through a frozen head `weight` (V, d).

    `labels` (n,) are the next tokens, negative where none counts.
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return loss


def full_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of whole `logits` (n, V): for heads that do more than multiply."""
    return functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
