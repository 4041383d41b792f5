"""What a merge rule sees of a round, and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aggregator.errors import MergeError
from aggregator.merge.lowrank import norm
from aggregator.merge.sums import Float64Array
from protocol.adapter import Adapter, Factors, FloatArray, LazyLayers, Shapes, module_rank
from protocol.factors import Trained

Directions = npt.NDArray[np.intp]
"""Ascending indices (r,) of the shared adapter's directions: one a row of A and column of B."""


@dataclass(frozen=True, slots=True)
class Change:
    """Hold what a device added to the product of a version, of scale 1: `ranks` by module.

    It is a product that may have twice the device's rank, and is of no directions of any version:
    so it can be added to another version than the one that it was made from.
    """

    layers: Mapping[str, Factors]
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Update:
    """Hold what one device sent: its factors after training, and where they belong.

    `adapter` holds absolute factors, not changes, and only of the directions that the device
    trained: row i of A and column i of B of a module are the shared direction
    `directions[module][i]`. With `directions = top` these are 0 … r-1. Ranks may differ from
    module to module, and a module may have rank 0. `staleness` is how many versions the one that
    it started from is behind `RoundView.previous`; the directions of another version are other
    vectors, so put such an update over the version it started from first (`completed`), or what it
    moved onto today's (`rebased`): then that is `moved`, beside the `adapter` that it is added to.
    """

    device: str
    adapter: Adapter
    directions: Mapping[str, Directions]
    examples: int
    metrics: Mapping[str, float]
    staleness: int = 0
    moved: Change | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Hold what a rule carries from round to round: low-rank sums, None where it carries none.

    `momentum` is the last change of the global, `residue` what the rank could not hold of it.
    """

    momentum: Adapter | None = None
    residue: Adapter | None = None


NOTHING_CARRIED = Memory()


@dataclass(frozen=True, slots=True)
class RoundView:
    """Hold a round as a merge rule sees it.

    `previous` is the global version of rank `rank` that every update started from, `rank` also
    that of the result; a module narrower than it has the rank it can have. `seed` decides the
    rows of A that re-seed dead directions; `memory` is what the last round handed on. Of a factor
    that is not among the `trained` ones every update has what `previous` has.
    """

    previous: Adapter
    updates: Sequence[Update]
    shapes: Shapes
    rank: int
    seed: int
    memory: Memory = NOTHING_CARRIED
    trained: Trained = "both"


@dataclass(frozen=True, slots=True)
class Merged:
    """Hold the result of a round.

    `adapter` is float32, `weights` the share that each device had, and `residual` what the
    combination lost: ‖weighted sum - result‖_F / ‖weighted sum‖_F over all modules. `warnings` are
    for the operator, `memory` for the next round.
    """

    adapter: Adapter
    weights: dict[str, float]
    residual: float
    warnings: tuple[str, ...] = ()
    memory: Memory = NOTHING_CARRIED


def completed(update: Update, held: Adapter) -> Update:
    """Put what a device trained over the full adapter that it held: trained + frozen remainder.

    The result covers all directions of `held`, in its scale. This is the full_j of personal
    adapters over the anchored form.
    """
    layers: dict[str, Factors] = {}
    ratio = update.adapter.scale / held.scale
    for module, whole in held.layers.items():
        trained, at = update.adapter.layers[module], update.directions[module]
        a, b = whole.a.copy(), whole.b.copy()  # (R, d_in), (d_out, R)
        a[at] = trained.a
        b[:, at] = trained.b * ratio
        layers[module] = Factors(a, b)
    every = {module: np.arange(whole.rank) for module, whole in layers.items()}
    return replace(update, adapter=Adapter(layers, held.scale), directions=every)


def rebased(update: Update, started: Adapter, previous: Adapter) -> Update:
    """Put what a device moved since the version it `started` from onto today's: ΔW_g + Δ_k.

    So what others have moved meanwhile stays where it is. Source: FedBuff, arXiv 2106.06639, here
    in product space.
    """
    ranks = {module: 2 * len(at) for module, at in update.directions.items()}
    change = changed(update, started).layers

    def rounded(module: str) -> Factors:  # each factor's digits are those of a difference already
        factors = change[module]
        return Factors(factors.a.astype(np.float32), factors.b.astype(np.float32))

    moved = Change(LazyLayers(tuple(change), rounded), ranks)
    every = {module: np.arange(whole.rank) for module, whole in previous.layers.items()}
    return replace(update, adapter=previous, directions=every, moved=moved)


def whole(update: Update) -> Adapter:
    """Return the adapter of an update, with what it moved where that lies beside it."""
    own, moved = update.adapter, update.moved
    if moved is None:
        return own

    def both(module: str) -> Factors:
        base, change = own.layers[module], moved.layers[module]
        a = np.concatenate([base.a, change.a])
        return Factors(a, np.concatenate([own.scale * base.b, change.b], axis=1))

    return Adapter(LazyLayers(tuple(own.layers), both), 1.0)


def changed(update: Update, held: Adapter) -> Adapter:
    """Return ΔW_k − ΔW_g restricted to the directions of k: by how much a device moved the product.

    Each module has twice the device's rank: BA − B'A' = (B − B')A + B'(A − A') with the scales in
    B. A norm or a Gram of these factors keeps its digits however small the change is, where the
    difference of two norms would lose them. In float64, of scale 1, and made when asked for. What
    lies beside an adapter that is `held` itself (`rebased`) is that already.
    """
    if update.moved is not None:
        return Adapter(update.moved.layers, 1.0)

    def change(module: str) -> Factors:
        before = held.layers[module].take(update.directions[module])
        after = update.adapter.layers[module]
        b_before = held.scale * before.b.astype(np.float64)  # (d_out, r)
        b_after = update.adapter.scale * after.b.astype(np.float64)
        moved = after.a.astype(np.float64) - before.a  # (r, d_in)
        return Factors(
            np.concatenate([after.a.astype(np.float64), moved]),
            np.concatenate([b_after - b_before, b_before], axis=1),
        )

    return Adapter(LazyLayers(tuple(held.layers), change), 1.0)


def change_norm(update: Update, held: Adapter) -> float:
    """Return ‖ΔW_k − ΔW_g restricted to the directions of k‖_F, over all modules."""
    return float(np.linalg.norm([norm(f) for f in changed(update, held).layers.values()]))


def change_norms(view: RoundView) -> Float64Array:
    """Return the `change_norm` of each device (K,)."""
    return np.array([change_norm(update, view.previous) for update in view.updates])


def check(view: RoundView) -> None:
    """Refuse a round that cannot be merged.

    Raises:
        MergeError: there is no update, or one (it is named, and its module) has modules, shapes,
            directions or values that it may not have.
    """
    if not view.updates:
        raise MergeError("the round has no update")
    for adapter in (view.previous, view.memory.momentum, view.memory.residue):
        if adapter is not None:
            _check_adapter(view, adapter, None)
    for module, shape in view.shapes.items():
        held = module_rank(shape, view.rank)
        if view.previous.layers[module].rank != held:
            raise MergeError(f"the shared adapter has not rank {held}", module=module)
    for update in view.updates:
        if update.examples < 0:
            raise MergeError(f"it counts {update.examples} examples", device=update.device)
        if update.staleness < 0:
            raise MergeError(f"it is {update.staleness} versions behind", device=update.device)
        _check_directions(view, update, _check_adapter(view, update.adapter, update.device))


def _check_adapter(view: RoundView, adapter: Adapter, device: str | None) -> dict[str, int]:
    """Check names, shapes and values; `device` is None for what is the aggregator's own.

    Each module's rank is returned, for to look it up may be to read a file.
    """
    if not (np.isfinite(adapter.scale) and adapter.scale > 0):
        raise MergeError(f"the scale {adapter.scale} is not a positive number", device=device)
    if strange := set(adapter.layers) ^ set(view.shapes):
        raise MergeError(
            "the job and the adapter differ in it", device=device, module=min(strange, key=str)
        )
    ranks = {}
    for module, (d_out, d_in) in view.shapes.items():
        factors = adapter.layers[module]
        a, b = factors.a, factors.b
        if a.ndim != 2 or a.shape[1] != d_in or b.shape != (d_out, a.shape[0]):
            why = f"A {a.shape} and B {b.shape} are not (r, {d_in}) and ({d_out}, r)"
            raise MergeError(why, device=device, module=module)
        if not (_finite(a) and _finite(b)):
            raise MergeError("it has NaN or infinite values", device=device, module=module)
        ranks[module] = factors.rank
    return ranks


def _finite(values: FloatArray) -> bool:
    """Return whether all values are finite: so they are where their sum of squares is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.vdot(values, values)) or np.isfinite(values).all())


def _check_directions(view: RoundView, update: Update, ranks: Mapping[str, int]) -> None:
    """Check that every row of A has one direction of the shared adapter, in ascending order."""
    for module, shape in view.shapes.items():
        at = update.directions.get(module)
        rank, held = ranks[module], module_rank(shape, view.rank)
        if (
            at is None
            or at.shape != (rank,)
            or (rank and (at[0] < 0 or at[-1] >= held or (np.diff(at) <= 0).any()))
        ):
            why = f"its directions are not {rank} ascending numbers below {held}"
            raise MergeError(why, device=update.device, module=module)
