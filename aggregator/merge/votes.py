"""How much each device of a round counts, once all that its job says about it is weighed.

A device has a *share* p_k, and a part of its change counts, c_k ≤ 1. Shares are relative: they sum
to 1. What c_k takes away goes to nobody else but to the previous global: with c_k·p_k on a
direction of device k, (1 − c_k)·p_k lies on that direction of ΔW_g, which shortens exactly
ΔW_k − ΔW_g restricted to what k trained. So each option works with any rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aggregator.errors import MergeError
from aggregator.merge.lowrank import gram
from aggregator.merge.robust import without_opposed
from aggregator.merge.round_view import RoundView, change_norms, changed
from aggregator.merge.settings import RuleSettings
from aggregator.merge.sums import Float64Array
from aggregator.merge.told import NotTold, discrepancy_share, loss_reduction_share
from aggregator.merge.voters import voters_of
from aggregator.merge.weighting import ColumnWeights, Weighting, equal_share, sample_share


@dataclass(frozen=True, slots=True)
class Votes:
    """Hold p (K,), c (K,), and what the operator should know."""

    shares: Float64Array
    counted: Float64Array
    warnings: tuple[str, ...] = ()


def cast_votes(view: RoundView, weighting: Weighting, settings: RuleSettings) -> Votes:
    """Return what each device counts: share, discount and clipping, who is opposed, robust, cap.

    Raises:
        MergeError: the shares go by examples, and no device has one; or the rule's are no shares.
    """
    votes = _own_shares(view, weighting, settings)
    if settings.staleness:
        votes = replace(votes, counted=votes.counted * staleness_discount(view))
    if settings.clip is not None:
        norms = change_norms(view) * votes.counted
        votes = replace(votes, counted=votes.counted * clipping(norms, settings.clip))
    if settings.opposed or weighting.robust is not None or settings.cap is not None:
        votes = _among_devices(view, weighting, settings, votes)
    return votes


def _among_devices(
    view: RoundView, weighting: Weighting, settings: RuleSettings, votes: Votes
) -> Votes:
    """Return votes once what bounds devices has been heard: opposed, robust, cap."""
    voters = voters_of(view, votes.shares)
    shares, counted, said = voters.shares(votes.shares), votes.counted, list(votes.warnings)
    if settings.opposed or weighting.robust is not None:
        products = gram([changed(u, view.previous) for u in view.updates])
        products = voters.gram(products * np.outer(counted, counted))
        if settings.opposed:
            shares, more = without_opposed(products, shares, voters.names, settings)
            said += more
        if weighting.robust is not None:
            shares, more = weighting.robust.reweigh(products, shares, voters.names, settings)
            said += more
    if settings.cap is not None:
        shares, left = capped(shares, settings.cap)
        counted = counted * left
    return Votes(voters.of_updates(shares), counted, tuple(said))


def _own_shares(view: RoundView, weighting: Weighting, settings: RuleSettings) -> Votes:
    """Return the shares that the settings name, else the rule's own; all changes count whole."""
    warnings: tuple[str, ...] = ()
    try:
        match settings.weights:
            case "samples":
                shares = sample_share(view)
            case "equal":
                shares = equal_share(view)
            case "loss-reduction":
                shares = loss_reduction_share(view)
            case "discrepancy":
                shares = discrepancy_share(
                    view, settings.discrepancy_slope, settings.discrepancy_offset
                )
            case None:
                shares = _checked(weighting.share(view), len(view.updates))
    except NotTold as missing:
        shares, warnings = sample_share(view), (f"{missing}; shares go by examples",)
    return Votes(shares, np.ones(len(shares)), warnings)


def _checked(shares: object, devices: int) -> Float64Array:
    """Return the shares that a rule's weighting gives, which may be another's code."""
    shares = np.asarray(shares, np.float64)
    if shares.shape != (devices,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise MergeError(
            f"the rule's shares {shares.tolist()} are not {devices} numbers of 0 or more whose sum "
            "is 1"
        )
    return shares


def staleness_discount(view: RoundView) -> Float64Array:
    """Return (1+τ_k)^−½ (K,), τ the versions an update is behind. Source: arXiv 2106.06639."""
    return np.asarray(1 / np.sqrt([1.0 + u.staleness for u in view.updates]))


def clipping(norms: Float64Array, limit: float | str) -> Float64Array:
    """Return min(1, limit/‖change_k‖) (K,); "median" is the median of the norms."""
    largest = float(np.median(norms)) if isinstance(limit, str) else limit
    shortened = np.divide(largest, norms, out=np.ones_like(norms), where=norms > 0)
    return np.asarray(np.minimum(1.0, shortened))


def capped(shares: Float64Array, cap: float) -> tuple[Float64Array, float]:
    """Return shares of at most `cap`, what is over shared out in proportion, and a factor.

    Where even equal shares are over the cap, they are equal and all count `factor` < 1.
    """
    voters = shares > 0
    if cap * voters.sum() <= 1:
        return np.asarray(voters / voters.sum()), float(cap * voters.sum())
    full = np.zeros(len(shares), bool)
    result = shares
    while (result > cap * (1 + 1e-12)).any():
        full |= result > cap
        rest = np.where(full, 0.0, shares)
        result = np.where(full, cap, rest * (1 - cap * full.sum()) / rest.sum())
    return result, 1.0


def counted_columns(
    columns: ColumnWeights, counted: Float64Array, view: RoundView, module: str
) -> ColumnWeights:
    """Move 1 − c_k of each column's weight to the same direction of the previous global."""
    if (counted == 1).all():
        return columns
    previous = columns.previous.copy()
    for update, own, part in zip(view.updates, columns.devices, counted, strict=True):
        previous[update.directions[module]] += (1 - part) * own
    devices = tuple(part * own for own, part in zip(columns.devices, counted, strict=True))
    return ColumnWeights(devices, previous)
