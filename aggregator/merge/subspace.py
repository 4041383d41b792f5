"""The leading singular subspace of a held sum, by passes over it, and a bound of what it lacks.

Subspace iteration with a Chebyshev filter (Zhou, Saad et al., J. Comput. Phys. 219, 2006): a random
block of b > r vectors goes through a polynomial of M = GᵀG that grows above the block's smallest
Ritz value and stays small below it. Rayleigh-Ritz then gives the best of the block.

What has come of it is checked in float64. Let V be the Ritz vectors, θ their values, descending,
R = MV − VΘ, and ℓ a bound of M on what is orthogonal to V. For any c ≥ θ_r, with
μ = eig(Θ + RᵀR/(c − ℓ)), the best r directions hold at most

    Σ_{i≤r} max(μ_i, c)

of ‖G‖², for X = max(Θ + RᵀR/(c − ℓ) − c, 0) makes M ≼ c + VXVᵀ (Schur), and no r orthonormal
vectors get more than r·c plus the r largest of X from the right side (Ky Fan). ‖G‖² less that is
the least that a truncation can lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.merge.sums import PART, Array, Float64Array, Held

ENOUGH = 5e-6
"""Relative errors at which passes end: half of what float32 results are held to."""
APART = 0.9
"""Where σ²_{r+1} is below this part of σ²_r, the directions themselves are determined."""
TURNS = 12
DEGREE, UNSETTLED = 16, 4
"""Most passes of one filter, and of one before θ_r has come to rest."""


@dataclass(frozen=True, slots=True)
class Ritz:
    """Hold the best of a block: V (n, b) orthonormal, M·V (n, b), θ (b,) descending."""

    v: Array
    back: Array
    values: Float64Array


@dataclass(frozen=True, slots=True)
class Leading:
    """Hold right vectors v (n, r), G·v (m, r), and ‖G − G·v·vᵀ‖²_F."""

    v: Array
    forth: Array
    lost: float

    @property
    def norm(self) -> float:
        """‖G‖_F."""
        return float(np.sqrt(self.lost + np.square(self.forth).sum()))


def block_width(rank: int) -> int:
    """Return b: spare vectors make the filter sharp where the spectrum is flat."""
    return rank + max(16, rank // 2)


def leading(held: Held, rank: int, seed: int) -> Leading | None:
    """Return the leading `rank` directions of a sum, or None where passes do not find them.

    What they lose is within `ENOUGH` of what the best ones do, or within 3e-7 of ‖G‖ where that is
    more. Where the directions are `APART` from the rest, the result is also within `ENOUGH` of the
    best one, in parts of it. Passes are made in float32 as long as that helps, if the sum is
    held in it, then in float64.
    """
    drawn = np.random.default_rng(seed).standard_normal((held.n, block_width(rank)), np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        forth, v = held.passed(drawn.astype(held.dtype, copy=False))
        whole = float(np.square(forth, dtype=np.float64).sum()) / v.shape[1]  # about ‖G‖²
        del drawn, forth
        before = np.inf
        for _ in range(TURNS):
            if not np.isfinite(v).all() or not v.any():
                return None
            v = _orthonormal(v)
            ritz, forth = _ritz(held, v)
            off = _off(ritz, rank, whole)
            rough = ritz.v.dtype == np.float32
            if not rough and off <= 1:
                v = ritz.v[:, :rank]
                del ritz
                return Leading(v, forth[:, :rank], held.lost(v))
            del forth
            slow = off > before / 4
            if slow and not rough:
                return None
            v, before, reached = ritz.v, off, True
            if off > 1 and not slow:
                v, reached = _filtered(held, ritz, rank, off)
            del ritz
            if rough and (slow or reached):
                v, before = v.astype(np.float64), np.inf
    return None


def _ritz(held: Held, v: Array) -> tuple[Ritz, Array]:
    """Return the best of the span of orthonormal columns (n, b), in their place, and G·V (m, b)."""
    forth, back = held.passed(v)
    values, turn = np.linalg.eigh((forth.T @ forth).astype(np.float64))
    order = turn[:, ::-1].astype(v.dtype)
    for columns in (v, forth, back):
        _turn(columns, order)
    return Ritz(v, back, np.maximum(values[::-1], 0.0)), forth


def _off(ritz: Ritz, rank: int, whole: float) -> float:
    """Return by how much a block is not good enough yet: the square of its error, by the limit's.

    What is lost is taken for half of what it seems, or what the spare vectors hold if that is more;
    ℓ is the Ritz value in the middle of the spare ones.
    """
    values = ritz.values
    across = np.zeros((len(values), len(values)))
    for part in _parts(len(ritz.v)):
        off = ritz.back[part] - ritz.v[part] * values
        across += off.T @ off
    lost = max(whole / 2 - values[:rank].sum(), values[rank:].sum())
    allowed = 2 * ENOUGH * lost + 1e-13 * whole
    middle, last = values[(rank + len(values)) // 2], values[rank - 1]
    excess = np.inf
    for slack in (0.0, allowed / (2 * rank)):
        c = last + slack
        if c > middle:
            best = np.linalg.eigvalsh(np.diag(values) + across / (c - middle))[::-1][:rank]
            excess = min(excess, float(np.sum(np.maximum(best, c) - values[:rank])))
    ratio = float(excess / allowed)
    if values[rank] < APART * last:
        squares = np.diag(across)[:rank] * (values[:rank] + values[rank])
        distance = np.sum(squares / (values[:rank] - values[rank]) ** 2)
        ratio = max(ratio, float(distance / values[:rank].sum()) / ENOUGH**2)
    return ratio


def _filtered(held: Held, ritz: Ritz, rank: int, off: float) -> tuple[Array, bool]:
    """Return p(M)·V for a Chebyshev polynomial, and whether it is of the degree that is needed.

    It is made in the place of V and M·V.

    On [0, θ_b] p is small. Its degree is limited by what rounding, in the directions that grow
    most, leaves of those that grow least; and as long as θ_r moves still, so does θ_b, and no
    degree that they tell is believed.
    """
    v, values, last = ritz.v, ritz.values, float(ritz.values[rank - 1])
    exact = float(np.finfo(v.dtype).eps)
    half = float(max(values[-1], exact * values[0])) / 2
    most, least = (float(np.arccosh(max(x / half - 1, 1.0))) for x in (values[0], last))
    wanted = np.log(4 * off) / 2 / max(least, 1e-3)
    bearable = -np.log(exact) / 2 / max(most - least, 1e-3)
    moves = float(np.linalg.norm(ritz.back[:, rank - 1] - v[:, rank - 1] * last))
    settled = moves <= (last - values[(rank + len(values)) // 2]) / 4
    degree = int(
        np.clip(np.ceil(wanted), 1, max(1, min(bearable, DEGREE if settled else UNSETTLED)))
    )
    start = 1 / (float(values[0]) / half - 1)
    older, newer, ratio = v, ritz.back, start
    _combine(newer, start / half, v, -start)
    for _ in range(degree - 1):
        after = 1 / (2 / start - ratio)
        _combine(older, -ratio * after, held.passed(newer)[1], 2 * after / half)
        _combine(older, 1.0, newer, -2 * after)
        older, newer, ratio = newer, older, after
    return newer, bool(degree >= wanted and settled)


def _combine(x: Array, p: float, y: Array, q: float) -> None:
    """Make x (n, b) into p·x + q·y."""
    for part in _parts(len(x)):
        x[part] *= p
        x[part] += y[part] * q


def _turn(columns: Array, by: Array) -> None:
    """Make columns (n, b) into columns·by."""
    for part in _parts(len(columns)):
        columns[part] = columns[part] @ by


def _parts(size: int) -> list[slice]:
    return [slice(at, at + 2 * PART) for at in range(0, size, 2 * PART)]


def _orthonormal(columns: Array) -> Array:
    """Return an orthonormal basis of the span of columns (n, b), by Cholesky-QR, or by QR.

    The first is made in the place of the columns.
    """
    for _ in range(1 if columns.dtype == np.float32 else 2):
        lengths = np.sqrt(np.einsum("ij,ij->j", columns, columns))
        columns /= np.where(lengths > 0, lengths, 1)
        try:
            root = np.linalg.cholesky((columns.T @ columns).astype(np.float64))
        except np.linalg.LinAlgError:
            return np.linalg.qr(columns)[0]
        _turn(columns, np.linalg.inv(root).T.astype(columns.dtype))
    return columns
