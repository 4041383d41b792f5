"""HetLoRA self-pruning: a device gives up rank that its text does not need (arXiv 2401.06432).

The loss carries λ·Σ_ℓ ‖B_ℓ[:, m:]‖_F·‖A_ℓ[m:, :]‖_F, which presses on the tail of each adapter
and leaves its head alone. When local training has made the tail's product smaller than it was
when it was received, the device cuts its rank to m.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.adapter import Adapter


def head_rank(rank: int, gamma: float, rank_min: int) -> int:
    """Return m = max(r_min, min(r−1, ⌊γr⌋)): where the tail starts, and the rank after a cut.

    The tail always holds at least one direction, unless the rank is already the smallest.
    """
    return max(rank_min, min(rank - 1, int(gamma * rank))) if rank > rank_min else rank


def tail_product(adapter: Adapter, head: int) -> float:
    """Return Σ_ℓ ‖B_ℓ[:, m:]‖_F·‖A_ℓ[m:, :]‖_F of an adapter."""
    return float(
        sum(
            np.linalg.norm(f.b[:, head:]) * np.linalg.norm(f.a[head:])
            for f in adapter.layers.values()
        )
    )


def penalty_gradient(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], head: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Return the penalty's gradient in one module's tails, A[m:] and B[:, m:]; None: there is none.

    Of f = ‖T_B‖·‖T_A‖ it is T_A·‖T_B‖/‖T_A‖ and T_B·‖T_A‖/‖T_B‖. A tail that is exactly zero (B
    before the first step) has no direction to shrink in.
    """
    tail_a, tail_b = a[head:], b[:, head:]
    norm_a, norm_b = np.linalg.norm(tail_a), np.linalg.norm(tail_b)
    if not norm_a or not norm_b:
        return None
    return tail_a * (norm_b / norm_a), tail_b * (norm_a / norm_b)


def rank_after(received: float, trained: float, rank: int, head: int) -> int:
    """Return the rank a device goes on with: m if the tail got strictly smaller, else its own."""
    return head if received > 0 and trained < received else rank
