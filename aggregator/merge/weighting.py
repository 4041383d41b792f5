"""How much each device counts, and each direction of it.

A weighting is two steps. A *share* says what part of the fleet each device is: (K,) numbers that
sum to 1, over whole adapters. A *spread* lays the shares of one module over the columns of the
stack, where the previous global may take part as one more contributor. Whatever changes a share
(staleness, norm clipping, a cap, a robust mean) comes between the two, in `votes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aggregator.errors import MergeError
from aggregator.merge.lowrank import norm
from aggregator.merge.robust import Robust
from aggregator.merge.round_view import RoundView, whole
from aggregator.merge.sums import Float64Array


@dataclass(frozen=True, slots=True)
class ColumnWeights:
    """Hold the weights of one module's columns.

    `devices` has (r_k,) for each update, `previous` (R,) for the previous global: zeros where it
    takes no part.
    """

    devices: tuple[Float64Array, ...]
    previous: Float64Array


Share = Callable[[RoundView], Float64Array]
Spread = Callable[[RoundView, str, Float64Array], ColumnWeights]


# ---- shares: (K,) ---------------------------------------------------------------------------


def sample_share(view: RoundView) -> Float64Array:
    """Return p_k = n_k / Σn_j, n the number of training examples.

    Source: FedAvg, arXiv 1602.05629.

    Raises:
        MergeError: no device has an example.
    """
    examples = np.array([update.examples for update in view.updates], np.float64)
    if not examples.any():
        raise MergeError("no update counts any example")
    return np.asarray(examples / examples.sum())


def equal_share(view: RoundView) -> Float64Array:
    """Return the same share for each device, in equal parts on its updates: 1/K where it has one.

    Robust rules start here, for a device says itself how much it has.
    """
    sent = Counter(update.device for update in view.updates)
    return np.array([1 / (len(sent) * sent[update.device]) for update in view.updates])


def norm_share(view: RoundView) -> Float64Array:
    """Return p_k = ‖ΔW_k‖_F / Σ‖ΔW_j‖_F over whole adapters; equal shares if all are zero.

    Source: "sparsity weighting", HetLoRA, arXiv 2401.06432.
    """
    norms = np.array(
        [
            full.scale * np.linalg.norm([norm(f) for f in full.layers.values()])
            for full in map(whole, view.updates)
        ],
        np.float64,
    )
    if not norms.any():
        return equal_share(view)
    return np.asarray(norms / norms.sum())


# ---- spreads: (r_k,) a device, (R,) the previous global -------------------------------------


def evenly(view: RoundView, module: str, shares: Float64Array) -> ColumnWeights:
    """Weigh every column of a device by its share p_k; the previous global takes no part."""
    held = view.previous.layers[module].rank
    return ColumnWeights(_own_shares(view, module, shares), np.zeros(held))


def among_holders(view: RoundView, module: str, shares: Float64Array) -> ColumnWeights:
    """Weigh direction h of device k by p_k / Σ_{j: j holds h} p_j.

    A direction that few devices hold is not diluted by those that do not; one that nobody holds
    is zero in the result. Source: rank-partitioned aggregation, arXiv 2602.13486.
    """
    held = _held_share(view, module, shares)
    return ColumnWeights(
        tuple(
            np.divide(own, held[at], out=np.zeros_like(own), where=held[at] > 0)
            for own, at in zip(_own_shares(view, module, shares), _at(view, module), strict=True)
        ),
        np.zeros_like(held),
    )


def anchored_by_previous(view: RoundView, module: str, shares: Float64Array) -> ColumnWeights:
    """Weigh a device's columns by p_k and the previous global's column h by the rest.

    ΔW⁺ = ΔW_g + Σp_k(ΔW_k - ΔW_g restricted to the directions of k), so the previous column h
    weighs 1 - Σ_{k: k holds h} p_k: changes are averaged and not values, and a direction that a
    device did not train gets no vote for zero from it. Ours; compare Fed-PLoRA, arXiv 2602.16936.
    """
    left = 1 - _held_share(view, module, shares)
    left[np.abs(left) < 1e-12] = 0.0  # everybody trained it: rounding, not a contributor
    return ColumnWeights(_own_shares(view, module, shares), left)


@dataclass(frozen=True, slots=True)
class Weighting:
    """Say how much each device counts, and how that lies on the columns of a module.

    `robust` corrects the shares by how far the changes of a round lie apart.
    """

    share: Share
    spread: Spread = evenly
    robust: Robust | None = None


def _at(view: RoundView, module: str) -> list[np.ndarray]:
    """Return the directions (r_k,) of each update in a module."""
    return [update.directions[module] for update in view.updates]


def _own_shares(view: RoundView, module: str, shares: Float64Array) -> tuple[Float64Array, ...]:
    """Return p_k for each column of each update."""
    return tuple(np.full(len(at), p) for at, p in zip(_at(view, module), shares, strict=True))


def _held_share(view: RoundView, module: str, shares: Float64Array) -> Float64Array:
    """Return Σ_{k: k holds h} p_k for each direction h (R,)."""
    total = np.zeros(view.previous.layers[module].rank)
    for at, p in zip(_at(view, module), shares, strict=True):
        total[at] += p
    return total
