"""Cross-entropy in chunks is cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from edge_client.trainer.loss import CHUNK_TOKENS, chunked_cross_entropy, full_cross_entropy


def case(tokens: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 12, generator=draw)
    weight = torch.randn(37, 12, generator=draw)
    labels = torch.randint(0, 37, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.3] = -100
    return hidden, weight, labels


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = hidden.clone().requires_grad_()
    loss = functional.cross_entropy(leaf @ weight.T, labels, ignore_index=-100, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize(
    "tokens", [1, 5, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7]
)
def test_loss_and_gradient_are_those_of_torch(tokens: int) -> None:
    hidden, weight, labels = case(tokens, seed=tokens)
    loss, gradient = reference(hidden, weight, labels)
    leaf = hidden.clone().requires_grad_()
    ours = chunked_cross_entropy(leaf, weight, labels)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        full_cross_entropy(hidden @ weight.T, labels), loss, rtol=1e-5, atol=1e-5
    )


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    hidden, weight, labels = case(100)
    _, gradient = reference(hidden, weight, labels)
    leaf = hidden.clone().requires_grad_()
    (chunked_cross_entropy(leaf, weight, labels) / 70).backward()
    torch.testing.assert_close(leaf.grad, gradient / 70, rtol=1e-5, atol=1e-6)


def test_ignored_labels_give_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = case(90)
    ignored = labels < 0
    assert ignored.any()
    leaf = hidden.clone().requires_grad_()
    chunked_cross_entropy(leaf, weight, labels).backward()
    assert leaf.grad is not None
    assert not leaf.grad[ignored].any()
    kept = chunked_cross_entropy(hidden[~ignored], weight, labels[~ignored])
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, labels), kept)


def test_nothing_counted_is_a_loss_of_zero() -> None:
    hidden, weight, labels = case(70)
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = case(70)
    loss, gradient = reference(hidden * 1e3, weight, labels)
    leaf = (hidden * 1e3).requires_grad_()
    ours = chunked_cross_entropy(leaf, weight, labels)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_the_loss_in_float32() -> None:
    hidden, weight, labels = case(100)
    low = hidden.bfloat16().requires_grad_()
    ours = chunked_cross_entropy(low, weight.bfloat16(), labels)
    ours.backward()
    loss, _ = reference(low.detach().float(), weight.bfloat16().float(), labels)
    assert ours.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    assert float(ours.detach()) == pytest.approx(float(loss), rel=2e-2)
