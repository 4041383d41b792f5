"""HetLoRA self-pruning: identity 10 of docs/algorithms.md, and the faults of public code."""

from __future__ import annotations

import pytest
import torch

from edge_client.prune import head_rank, penalty_gradient, rank_after, tail_product
from protocol.adapter import Adapter, Factors

Pair = tuple[torch.Tensor, torch.Tensor]


def factors(seed: int, rank: int, *, layers: int = 3) -> list[Pair]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rank, 5 + i, generator=draw).requires_grad_(),
            torch.randn(7 + i, rank, generator=draw).requires_grad_(),
        )
        for i in range(layers)
    ]


def adapter_of(pairs: list[Pair]) -> Adapter:
    layers = {
        f"m{i}": Factors(a.detach().numpy(), b.detach().numpy()) for i, (a, b) in enumerate(pairs)
    }
    return Adapter(layers, 2.0)


def gradient_of(pair: Pair, head: int) -> Pair | None:
    found = penalty_gradient(pair[0].detach().numpy(), pair[1].detach().numpy(), head)
    return None if found is None else (torch.from_numpy(found[0]), torch.from_numpy(found[1]))


@pytest.mark.parametrize(("rank", "head"), [(8, 7), (8, 4), (3, 2), (2, 1)])
def test_the_gradient_is_that_of_the_tails_product(rank: int, head: int) -> None:
    for a, b in factors(1, rank):
        (b[:, head:].norm() * a[head:].norm()).backward()  # type: ignore[no-untyped-call]
        found = gradient_of((a, b), head)
        assert found is not None and a.grad is not None and b.grad is not None
        torch.testing.assert_close(found, (a.grad[head:], b.grad[:, head:]))
        assert all(each.abs().min() > 0 for each in found)


def test_a_step_down_the_gradient_makes_the_tail_smaller() -> None:
    pairs = factors(2, 8)
    product = tail_product(adapter_of(pairs), 6)
    with torch.no_grad():
        for a, b in pairs:
            found = gradient_of((a, b), 6)
            assert found is not None
            a[6:] -= 0.01 * found[0]
            b[:, 6:] -= 0.01 * found[1]
    assert tail_product(adapter_of(pairs), 6) < product


def test_a_tail_of_zero_has_no_gradient() -> None:
    ((a, b),) = factors(4, 8, layers=1)
    b.data[:, 6:] = 0
    assert gradient_of((a, b), 6) is None


def test_a_module_narrower_than_the_head_has_no_tail() -> None:
    pairs = factors(5, 4)
    assert gradient_of(pairs[0], 6) is None
    assert tail_product(adapter_of(pairs), 6) == 0.0


@pytest.mark.parametrize("gamma", [0.5, 0.85, 0.99, 0.999999])
def test_the_tail_is_never_empty(gamma: float) -> None:
    for rank in range(2, 130):
        head = head_rank(rank, gamma, 1)
        assert 1 <= head < rank


def test_rank_8_with_gamma_99_cuts_one() -> None:
    assert round(0.99 * 8) == 8  # the fault: an empty tail
    assert head_rank(8, 0.99, 2) == 7


def test_a_cut_with_gamma_99_removes_one_rank_at_a_time() -> None:
    assert all(head_rank(r, 0.99, 1) == r - 1 for r in range(2, 100))


@pytest.mark.parametrize(
    ("rank", "gamma", "least", "head"),
    [
        (16, 0.85, 2, 13),
        (8, 0.85, 2, 6),
        (4, 0.5, 2, 2),
        (4, 0.1, 3, 3),  # never below the smallest rank
        (2, 0.5, 2, 2),
        (2, 0.5, 5, 2),  # a rank below the smallest stays as it is
        (1, 0.5, 1, 1),
    ],
)
def test_head_rank_table(rank: int, gamma: float, least: int, head: int) -> None:
    assert head_rank(rank, gamma, least) == head


def test_never_below_the_smallest_rank_however_often_it_is_cut() -> None:
    rank = 50
    for _ in range(100):
        rank = rank_after(1.0, 0.5, rank, head_rank(rank, 0.85, 5))
    assert rank == 5


@pytest.mark.parametrize(
    ("received", "trained", "kept"),
    [
        (1.0, 0.999, 7),
        (1.0, 1.0, 8),  # strictly smaller or not at all
        (1.0, 1.001, 8),
        (0.0, 0.0, 8),  # a zero tail (B = 0 in round 1) never prunes
        (0.0, 0.5, 8),
        (1.0, 0.0, 7),
        (1.0, float("nan"), 8),
    ],
)
def test_rank_after_table(received: float, trained: float, kept: int) -> None:
    assert rank_after(received, trained, 8, 7) == kept
