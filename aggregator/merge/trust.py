"""Trust weights: one merged adapter a device, from the devices it has most in common with.

Pure functions: scores (K, K) of how far device i trusts adapter j, their softmax, and the merge
of all rows. Who measures what, and when, is in `aggregator.personal`. Source of the scores:
arXiv 2404.09753; the formulas here are those of docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregator.errors import BadRuleSettings, MergeError
from aggregator.merge.lowrank import Split, made, module_seed, split_factors, stack_basis
from aggregator.merge.round_view import RoundView, check
from aggregator.merge.rule import as_float32
from aggregator.merge.sums import Float64Array, Term
from protocol.adapter import Adapter, Factors
from protocol.probe import TopLogits


def softmax_rows(scores: Float64Array, temperature: float = 1.0) -> Float64Array:
    """Return w_i = softmax(score_i / temperature) for each row of `scores` (K, K).

    A score of -inf weighs nothing: nobody measured that pair.

    Raises:
        BadRuleSettings: the temperature is not a positive number.
        MergeError: a score is NaN or +inf, or a row has nothing but -inf.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise BadRuleSettings(f"temperature must be a positive number, not {temperature}")
    highest = scores.max(axis=1, keepdims=True)  # NaN if any is
    if not np.isfinite(highest).all():
        row = int(np.flatnonzero(~np.isfinite(highest))[0])
        raise MergeError(f"row {row} of the trust scores has no usable highest score")
    powers = np.exp((scores - highest) / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def cosine_scores(gram: Float64Array) -> Float64Array:
    """Return cos(ΔW_i, ΔW_j) (K, K) from a round's Gram; a zero delta is like itself alone."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    np.fill_diagonal(cosines, 1.0)
    return np.asarray(np.clip(cosines, -1.0, 1.0))


def prediction_distance(probes: Sequence[TopLogits]) -> Float64Array:
    """Return D_ij (K, K): L1 distance between top-k logits, a mean over the probe's positions.

    Only the tokens that some device names at a position are laid out there, at most K·k.

    Raises:
        MergeError: two devices answered on a different number of positions.
    """
    total = np.zeros((len(probes), len(probes)))
    if len({len(probe.indices) for probe in probes}) > 1:
        raise MergeError("the devices answered on different numbers of probe positions")
    positions = len(probes[0].indices) if probes else 0
    owner = np.repeat(np.arange(len(probes)), [probe.indices.shape[1] for probe in probes])
    for at in range(positions):
        tokens = np.concatenate([probe.indices[at] for probe in probes])
        named, column = np.unique(tokens, return_inverse=True)
        logits = np.zeros((len(probes), len(named)))
        logits[owner, column] = np.concatenate([probe.values[at] for probe in probes])
        for i, own in enumerate(logits):
            total[i] += np.abs(logits - own).sum(axis=1)
    return total / max(positions, 1)


def prediction_scores(distance: Float64Array, tau: float | None = None) -> Float64Array:
    """Return score_ij = -τ·D_ij / typical_i, τ = 10/K by default; 0 where a row is all zero.

    The source divides by mean_j D_ij, which one far answer makes as large as it likes, so that all
    others look alike. Here the median over the others stands for each of them in that mean; where
    it is zero (most answered the same) the mean is taken.
    """
    devices = len(distance)
    mean = distance.mean(axis=1, keepdims=True)
    others = distance[~np.eye(devices, dtype=bool)].reshape(devices, devices - 1)
    median = np.median(others, axis=1, keepdims=True) if devices > 1 else np.zeros((devices, 1))
    typical = np.where(median > 0, median * (devices - 1) / devices, mean)
    relative = np.divide(distance, typical, out=np.zeros_like(distance), where=typical > 0)
    return np.asarray(-(10 / devices if tau is None else tau) * relative)


def personal(
    view: RoundView,
    rows: Float64Array,
    pushed: Float64Array | None = None,
    *,
    split: Split = "balanced",
) -> list[Adapter]:
    """Merge one adapter for each row: i is the best rank-R form of Σ_j rows[i, j]·ΔW_j + β_i·v.

    `rows` (M, K) has a column for each update, in their order; `pushed` (M,) has β (default: 0 for
    all) of what `view.memory` has as momentum, v (0 where it has none). The stacks are decomposed
    once a module (see `lowrank.StackBasis`), then each row costs one small eigenproblem and two
    thin products. The previous global takes no part: for the anchored form give updates that are
    `round_view.completed`.

    Raises:
        MergeError: the round cannot be merged, or `rows` are not weights of its updates.
    """
    check(view)
    devices = len(view.updates)
    if rows.shape[1:] != (devices,) or not np.isfinite(rows).all() or (rows < 0).any():
        raise MergeError(f"trust rows must have {devices} columns and not be negative")
    if not np.allclose(rows.sum(axis=1), 1.0):
        raise MergeError("a row of trust weights does not sum to 1")
    momentum = view.memory.momentum
    if momentum is not None and pushed is not None and pushed.any():
        rows = np.column_stack([rows, pushed])
    else:
        momentum = None
    results: list[dict[str, Factors]] = [{} for _ in rows]
    for module in view.shapes:
        for layers, factors in zip(
            results, _personal_layer(view, module, momentum, rows, split), strict=True
        ):
            layers[module] = as_float32(factors, module)
    return [Adapter(layers, view.previous.scale) for layers in results]


def _personal_layer(
    view: RoundView, module: str, momentum: Adapter | None, rows: Float64Array, split: Split
) -> list[Factors]:
    """Return one module's factors for each row, which has a column for each adapter."""
    adapters = [update.adapter for update in view.updates]
    adapters += [momentum] if momentum is not None else []
    layers = [adapter.layers[module] for adapter in adapters]
    terms = [Term(f, np.full(f.rank, a.scale)) for f, a in zip(layers, adapters, strict=True)]
    basis = stack_basis(terms)
    rank, scale = view.previous.layers[module].rank, view.previous.scale
    seed = module_seed(view.seed, module)
    ranks = [f.rank for f in layers]
    found = (basis.leading(np.repeat(row, ranks), rank) for row in rows)
    best = (made(one, terms, np.float32) for one in found)
    return [split_factors(one, rank, scale, split, seed).factors for one in best]
