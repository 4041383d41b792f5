"""How one module's weighted updates become one pair of factors.

mean(B)·mean(A) ≠ mean(BA): a factor average loses Σp_k(B_k-B̄)(A_k-Ā), a product average only
what the rank cannot hold. All three report what they lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aggregator.merge.lowrank import Combined, Split, revived, truncate
from aggregator.merge.round_view import Directions
from aggregator.merge.sums import Source, Term, norm_of, read
from protocol.adapter import Factors, FloatArray


@dataclass(frozen=True, slots=True)
class Contribution:
    """Hold one contributor to a module: a device, or the previous global.

    Row i of its A is the shared direction `directions[i]` and weighs `weights[i]`; `scale` is s of
    the adapter that the factors come from.
    """

    source: Source
    directions: Directions
    weights: np.ndarray
    scale: float

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the numbers: who gets them can't read where they came from."""
        return Contribution, (read(self.source), self.directions, self.weights, self.scale)

    @property
    def term(self) -> Term:
        """The contribution as a weighted scaled delta."""
        return Term(self.source, self.weights * self.scale)


@dataclass(frozen=True, slots=True)
class LayerUpdates:
    """Hold all that a combination needs of one module of `shape` (d_out, d_in).

    `rank` and `scale` are the result's; `seed` is the module's own. `carried` is what earlier
    rounds, and changes that were made to other versions, add to the sum. `frozen_a` (R, d_in) or
    `frozen_b` (d_out, R) is a factor that nobody trained: all contributions have their rows or
    columns of it.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    contributions: tuple[Contribution, ...]
    split: Split
    seed: int
    carried: tuple[Term, ...] = ()
    frozen_a: FloatArray | None = None
    frozen_b: FloatArray | None = None

    @property
    def terms(self) -> list[Term]:
        """The contributions, and what is carried, as weighted scaled deltas."""
        return [*(c.term for c in self.contributions), *self.carried]


Combination = Callable[[LayerUpdates], Combined]


def factor_average(layer: LayerUpdates) -> Combined:
    """Average A and B apart, direction by direction; who lacks a direction counts as zero in it.

    B̄[:, h] = Σp_k B_k[:, h], Ā[h] = Σp_k A_k[h] (zero-padded to R). A foreign scale is folded
    into B alone. A frozen factor stays as it is, so that the average is the mean of the products
    (LoRA-A², arXiv 2410.22815); a foreign scale goes to the other one. What is carried is a
    product: with it the average becomes one too, which is where alone `split` has a meaning.
    Source: HetLoRA, arXiv 2401.06432.
    """
    d_out, d_in = layer.shape
    a, b = np.zeros((layer.rank, d_in)), np.zeros((d_out, layer.rank))
    for c in layer.contributions:
        factors, scaled = read(c.source), c.weights * (c.scale / layer.scale)
        a_weights = c.weights if layer.frozen_b is None else scaled
        a[c.directions] += a_weights[:, None] * factors.a
        b[:, c.directions] += scaled * factors.b
    if layer.frozen_a is not None:
        a = layer.frozen_a.astype(np.float64)
    if layer.frozen_b is not None:
        b = layer.frozen_b.astype(np.float64)
    average, values = revived(Factors(a, b), layer.seed), np.zeros(0)
    if layer.carried:
        own = Term(Factors(a, b), np.full(layer.rank, layer.scale))
        moved = product(replace(layer, contributions=(), carried=(own, *layer.carried)))
        average, values = moved.factors, moved.singular_values
    lost = Term(average, np.full(layer.rank, -layer.scale))
    norms = (norm_of(terms, layer.shape) for terms in (layer.terms, [*layer.terms, lost]))
    return Combined(average, values, *norms)


def product(layer: LayerUpdates) -> Combined:
    """Average the products: the best rank-R approximation of ΣpΔW, in float32 where that will do.

    Source: FlexLoRA, arXiv 2402.11505.
    """
    return truncate(
        layer.terms,
        layer.shape,
        layer.rank,
        scale=layer.scale,
        split=layer.split,
        seed=layer.seed,
        dtype=np.float32,
    )


def stack(layer: LayerUpdates) -> Combined:
    """Stack the factors, [B₁ … B_K][A₁; …; A_K], exact at rank Σr_k, and compress that to rank R.

    The stack is the sum that `product` averages, so that their best forms of rank R are one; what
    `product` does decides which of the two is held. Source: FLoRA, arXiv 2409.05976.
    """
    return product(layer)
