"""Cross-entropy over a vocabulary, a chunk of positions at a time.

The logits of a batch (tokens, vocabulary) are often its largest tensor. The output head is frozen,
so the gradient with respect to the hidden states is known as soon as a chunk's logits are: both
are computed in the forward pass, and no more than one chunk of logits ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CHUNK_TOKENS = 64


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            label = labels[part]
            counted = label >= 0
            target = label.clamp(min=0)[:, None]
            logits = (hidden[part] @ weight.T).float()  # (chunk, vocabulary)
            log_z = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, target)[:, 0]
            total += ((log_z - picked) * counted).sum()
            # d loss / d logits = softmax − one-hot, and nothing where no label counts
            logits.sub_(log_z[:, None]).exp_()
            logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
            logits.mul_(counted[:, None])
            gradient[part] = logits.to(weight.dtype) @ weight
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
