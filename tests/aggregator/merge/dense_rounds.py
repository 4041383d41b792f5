"""What rounds and results mean as dense float64 matrices: shares no code with the engine."""

from __future__ import annotations

import numpy as np

from aggregator.merge import RoundView, Update
from protocol.adapter import Adapter, module_rank
from tests.aggregator.merge.made_rounds import Dense, best, dense


def flat(adapter: Adapter, view: RoundView) -> Dense:
    """Return all of an adapter's deltas as one vector."""
    return np.concatenate([dense(adapter.layers[n], adapter.scale).ravel() for n in view.shapes])


def change(update: Update, view: RoundView, module: str) -> Dense:
    """Return ΔW_k − ΔW_g in the directions of k, of one module."""
    before = view.previous.layers[module].take(update.directions[module])
    own = dense(update.adapter.layers[module], update.adapter.scale)
    return own - dense(before, view.previous.scale)


def flat_change(update: Update, view: RoundView) -> Dense:
    return np.concatenate([change(update, view, n).ravel() for n in view.shapes])


def assert_best(result: Adapter, wanted: dict[str, Dense], view: RoundView) -> None:
    """Check each module to be a best approximation of its rank, in float32, of what is wanted."""
    parts = [view.previous, *(u.adapter for u in view.updates)]
    for module, total in wanted.items():
        held = module_rank(view.shapes[module], view.rank)
        cut = best(total, held)
        ours = dense(result.layers[module], result.scale)
        size = max(float(np.linalg.norm(total)), 1e-6 * largest(parts, module))
        error = np.linalg.norm(total - ours) - np.linalg.norm(total - cut)
        assert abs(error) <= 5e-6 * size
        values = np.linalg.svd(total, compute_uv=False)
        if held == len(values) or values[held - 1] - values[held] > 1e-3 * values[0]:
            assert np.linalg.norm(ours - cut) <= 2e-5 * size  # the best is unique


def largest(adapters: list[Adapter], module: str) -> float:
    return max(float(np.linalg.norm(dense(a.layers[module], a.scale))) for a in adapters)
