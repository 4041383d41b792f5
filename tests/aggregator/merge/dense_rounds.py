"""Random rounds, and what they mean as dense float64 matrices: shares no code with the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from aggregator.merge import RoundView, Update
from protocol.adapter import Adapter, Factors, Shapes, directions, module_rank

Dense = npt.NDArray[np.float64]
SHAPES: Shapes = {
    "square": (9, 9),
    "wide": (5, 18),
    "tall": (16, 6),
    "narrow": (3, 11),  # narrower than the rank
    "row": (1, 8),
    "column": (7, 1),
}


def draw(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> Factors:
    d_out, d_in = shape
    return Factors(
        rng.standard_normal((rank, d_in)).astype(np.float32),
        rng.standard_normal((d_out, rank)).astype(np.float32),
    )


@st.composite
def rounds(drawn: st.DrawFn, most: int = 6) -> RoundView:
    """Rounds of unequal ranks, scales, directions, ages and metrics; some zero, some twice."""
    rng = np.random.default_rng(drawn(st.integers(0, 2**32 - 1)))
    rank, mode = drawn(st.integers(1, 7)), drawn(st.sampled_from(["top", "rotating"]))
    shapes = {n: SHAPES[n] for n in drawn(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1))}
    scale = drawn(st.sampled_from([0.25, 2.0]))
    held = {n: module_rank(s, rank) for n, s in shapes.items()}
    previous = Adapter({n: draw(rng, s, held[n]) for n, s in shapes.items()}, scale)
    updates: list[Update] = []
    for k in range(drawn(st.integers(1, most))):
        kind = drawn(st.sampled_from(["own", "own", "own", "zero", "duplicate", "same", "flat"]))
        if kind == "duplicate" and updates:
            updates.append(replace(updates[-1], device=f"d{k}"))
            continue
        own = 0 if kind == "flat" else drawn(st.integers(1, rank))
        at = {
            n: np.array(
                directions(mode, job="j", device=f"d{k}", round_number=3, rank=own, held=held[n]),
                np.intp,
            )
            for n in shapes
        }
        size = np.float32(0 if kind == "zero" else 1)
        layers = {
            n: Factors((f := draw(rng, s, len(at[n]))).a, f.b * size) for n, s in shapes.items()
        }
        if kind == "same":  # it changed nothing
            layers = {n: previous.layers[n].take(at[n]) for n in shapes}
        own_scale = scale if kind == "same" else drawn(st.sampled_from([scale, 0.5]))
        metrics = {f"tokens_{i}": float(rng.integers(0, 9)) for i in range(15)} | {"tokens_15": 1.0}
        metrics["train_loss_before"], metrics["train_loss_after"] = 3.0, 3.5 - rng.uniform()
        updates.append(
            Update(
                f"d{k}",
                Adapter(layers, own_scale),
                at,
                drawn(st.integers(0 if k else 1, 50)),
                metrics,
                drawn(st.integers(0, 3)),
            )
        )
    return RoundView(previous, updates, shapes, rank, 7)


def dense(factors: Factors, scale: float) -> Dense:
    product: Dense = scale * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return product


def best(matrix: Dense, rank: int) -> Dense:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    cut: Dense = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return cut


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
