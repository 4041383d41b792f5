"""Rounds to merge, drawn or made by hand, and their deltas as dense matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from aggregator.merge import RoundView, Update
from protocol.adapter import Adapter, Factors, Shapes, directions, module_rank

Dense = npt.NDArray[np.float64]
SHAPES: Shapes = {
    "square": (10, 10),
    "wide": (6, 21),
    "tall": (19, 7),
    "narrow": (3, 12),  # narrower than the rank
    "row": (1, 9),
    "column": (8, 1),
}


def draw(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> Factors:
    d_out, d_in = shape
    return Factors(
        rng.standard_normal((rank, d_in)).astype(np.float32),
        rng.standard_normal((d_out, rank)).astype(np.float32),
    )


@st.composite
def rounds(drawn: st.DrawFn, most: int = 6) -> RoundView:
    """Rounds of unequal ranks, scales, directions, ages and metrics.

    Some devices send zeros, hardly anything, what they received, or what another sends.
    """
    rng = np.random.default_rng(drawn(st.integers(0, 2**32 - 1)))
    rank, mode = drawn(st.integers(1, 8)), drawn(st.sampled_from(["top", "rotating"]))
    shapes = {n: SHAPES[n] for n in drawn(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1))}
    scale = drawn(st.sampled_from([0.25, 1.0, 2.0]))
    held = {n: module_rank(s, rank) for n, s in shapes.items()}
    previous = Adapter({n: draw(rng, s, held[n]) for n, s in shapes.items()}, scale)
    updates: list[Update] = []
    kinds = ["own", "own", "own", "zero", "duplicate", "tiny", "same", "flat"]
    for k in range(drawn(st.integers(1, most))):
        kind = drawn(st.sampled_from(kinds))
        if kind == "duplicate" and updates:
            updates.append(replace(updates[-1], device=f"d{k}"))
            continue
        device_rank = 0 if kind == "flat" else drawn(st.integers(1, rank))
        at = {
            n: np.array(
                directions(
                    mode, job="j", device=f"d{k}", round_number=3, rank=device_rank, held=held[n]
                ),
                np.intp,
            )
            for n in shapes
        }
        size = np.float32({"zero": 0.0, "tiny": 1e-6}.get(kind, 1.0))
        layers = {
            n: Factors((f := draw(rng, s, len(at[n]))).a, f.b * size) for n, s in shapes.items()
        }
        own_scale = drawn(st.sampled_from([scale, scale, 0.5]))
        if kind == "same":
            layers, own_scale = {n: previous.layers[n].take(at[n]) for n in shapes}, scale
        metrics = {f"tokens_{i}": float(rng.integers(0, 9)) for i in range(15)} | {"tokens_15": 1.0}
        metrics["train_loss_before"], metrics["train_loss_after"] = 3.0, 3.5 - rng.uniform()
        examples, behind = drawn(st.integers(0 if k else 1, 50)), drawn(st.integers(0, 3))
        updates.append(Update(f"d{k}", Adapter(layers, own_scale), at, examples, metrics, behind))
    return RoundView(previous, updates, shapes, rank, 7)


def one_module(updates: list[Update], rank: int, shape: tuple[int, int] = (9, 8)) -> RoundView:
    rng = np.random.default_rng(5)
    return RoundView(Adapter({"m": draw(rng, shape, rank)}, 1.0), updates, {"m": shape}, rank, 3)


def update(
    device: str, at: list[int], seed: int, examples: int = 1, shape: tuple[int, int] = (9, 8)
) -> Update:
    f = draw(np.random.default_rng(seed), shape, len(at))
    return Update(device, Adapter({"m": f}, 1.0), {"m": np.array(at, np.intp)}, examples, {})


GOOD = update("good", [0, 1, 2], 0)
LAYER = GOOD.adapter.layers["m"]
BAD = replace(GOOD, device="bad")


def dense(factors: Factors, scale: float) -> Dense:
    product: Dense = scale * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return product


def best(matrix: Dense, rank: int) -> Dense:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    cut: Dense = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return cut
