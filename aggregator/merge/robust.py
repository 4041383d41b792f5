"""Shares that a few dishonest devices cannot buy: from the Gram of a round's changes alone.

A change is ΔW_k − ΔW_g restricted to what device k trained, so that devices of any ranks and
directions are points of one space: that of their full adapters, moved by the same ΔW_g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from aggregator.merge.settings import GeomedSettings, KrumSettings, RuleSettings
from aggregator.merge.sums import Float64Array

Reweigh = Callable[[Float64Array, Float64Array, Sequence[str], Any], tuple[Float64Array, list[str]]]
"""Gram (K, K) and shares (K,) of devices, their names, settings → shares, and what to warn of."""
LEVER = "raise policy.quorum, in buffered rounds policy.buffer"
"""What an operator does about a round of too few devices."""


@dataclass(frozen=True, slots=True)
class Robust:
    """Pair a way to reweigh devices with the settings that it reads."""

    reweigh: Reweigh
    settings: type[RuleSettings]


def geometric_median(
    gram: Float64Array, shares: Float64Array, devices: Sequence[str], settings: GeomedSettings
) -> tuple[Float64Array, list[str]]:
    """Return the shares w whose mean Σw_k·x_k is the geometric median: argmin_z Σp_k‖x_k − z‖.

    Weiszfeld: w_k ∝ p_k / max(ν, ‖x_k − z‖), with ‖x_k − z‖² = G_kk − 2(Gw)_k + wᵀGw and
    ν = `smoothing` x the median norm, which a minority cannot move. Source: RFA, arXiv 1912.13445.
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    nearest = max(settings.smoothing * float(np.median(norms)), 1e-150)
    weights = shares
    for _ in range(settings.iterations):
        across = gram @ weights
        squares = np.diag(gram) - 2 * across + weights @ across
        inverse = shares / np.maximum(np.sqrt(np.maximum(squares, 0.0)), nearest)
        before, weights = weights, inverse / inverse.sum()
        if np.abs(weights - before).sum() <= settings.tolerance:
            break
    return weights, []


def krum(
    gram: Float64Array, shares: Float64Array, devices: Sequence[str], settings: KrumSettings
) -> tuple[Float64Array, list[str]]:
    """Return the shares with those of the f devices furthest from their neighbours at 0.

    A device's score is the sum of its squared distances to its K − f − 2 nearest others; the
    K − f of lowest score stay (Multi-Krum; ties go by name). It needs K ≥ 2f + 3: in a smaller
    round f is what K allows, and that is warned of. Source: Blanchard et al., NeurIPS 2017.
    """
    count = len(shares)
    assumed, warnings = settings.byzantine, list[str]()
    if isinstance(assumed, float):
        assumed = part_of(count, assumed)
        if count < (least := krum_needs(settings.byzantine)):
            why = f"krum leaves nobody out of {count} devices; that takes {least}"
            warnings.append(f"{why}: {LEVER}")
    f = min(assumed, max((count - 3) // 2, 0))
    if f < assumed and not warnings:
        why = f"krum against {assumed} dishonest devices needs {2 * assumed + 3}"
        warnings.append(f"{why}, the round has {count}: it withstands {f}; {LEVER}")
    norms = np.diag(gram)
    squares = np.maximum(norms[:, None] + norms - 2 * gram, 0.0)
    np.fill_diagonal(squares, np.inf)
    nearest = np.sort(squares, axis=1)[:, : max(count - f - 2, 0)]
    scores = nearest.sum(axis=1)  # (K,)
    unit = float(np.median(scores)) or 1.0
    order = sorted(range(count), key=lambda k: (round(float(scores[k]) / unit, 9), devices[k]))
    kept = np.zeros(count)
    kept[order[: count - f]] = shares[order[: count - f]]
    if not kept.any():
        kept[order[: count - f]] = 1.0
        warnings.append("those that krum keeps had no share; they count alike")
    return kept / kept.sum(), warnings


def part_of(count: int, share: float) -> int:
    """Return how many of some devices a share is, rounded down: 0.1 of 30 is 3."""
    return int(share * count + 1e-9)


def opposed_needs(most: float) -> int:
    """Return of how many devices a share is one."""
    return ceil(1 / most - 1e-9) if most else 0


def krum_needs(byzantine: float) -> int:
    """Return the updates that Krum takes against f devices, or to leave out one by a share."""
    if isinstance(byzantine, int):
        return 2 * byzantine + 3 if byzantine else 0
    return max(2 + 3, opposed_needs(byzantine)) if byzantine else 0


def without_opposed(
    gram: Float64Array, shares: Float64Array, devices: Sequence[str], settings: RuleSettings
) -> tuple[Float64Array, list[str]]:
    """Return the shares with those of devices whose changes point against the others' at 0.

    A device agrees with the others by the mean cosine of its change with each of theirs. While the
    least of these is below zero its device is left out, and the rest are asked anew: for who
    mirrors an honest device makes that one look opposed too. At most the part `opposed` of those
    that have a share is left out; ties go by name. Lengths play no part, they are for `clip`.
    Compare the cosines to the mean in Muñoz-González et al., arXiv 1909.05125.
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    lengths = np.where(norms > 0, norms, 1.0)
    cosines = gram / lengths / lengths[:, None]
    np.fill_diagonal(cosines, 0.0)
    kept = shares > 0
    count, warnings = int(kept.sum()), list[str]()
    most = part_of(count, settings.opposed)
    if not most:
        why = f"opposed = {settings.opposed:g} leaves nobody out of {count} devices"
        warnings.append(f"{why}; that takes {opposed_needs(settings.opposed)}")
    for _ in range(most):
        agreement = np.where(kept, cosines @ kept, np.inf).round(9)  # (K,)
        worst = min(range(len(shares)), key=lambda k: (agreement[k], devices[k]))
        if agreement[worst] >= 0:
            break
        kept[worst] = False
    return np.asarray(np.where(kept, shares, 0.0) / shares[kept].sum()), warnings


GEOMED = Robust(geometric_median, GeomedSettings)
KRUM = Robust(krum, KrumSettings)
