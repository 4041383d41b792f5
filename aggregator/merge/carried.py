"""What a rule carries from one round to the next, in product space and at a bounded rank.

Both are sums of products, so that they live through any change of basis between rounds:

    momentum    v = best rank-q form of ΔW⁺ − ΔW_g     adds β·v to the next sum
    residue     e = best rank-q form of sum − ΔW⁺      adds e to the next sum

The momentum is the heavy ball: β times what the last round moved. Source: FedAvgM, arXiv
1909.06335, there on dense weights; error feedback: arXiv 1901.09847. Pure functions: who keeps
`Memory` between two rounds hands it in with the `RoundView`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aggregator.merge.lowrank import truncate
from aggregator.merge.round_view import Memory, RoundView
from aggregator.merge.settings import RuleSettings
from aggregator.merge.sums import Term
from protocol.adapter import Adapter, Factors, module_rank


def carried_terms(view: RoundView, module: str, settings: RuleSettings) -> tuple[Term, ...]:
    """Return what the memory adds to the weighted sum of a module, as the settings want it."""
    momentum, residue = view.memory.momentum, view.memory.residue
    terms = []
    if settings.momentum and momentum is not None:
        terms.append(_term(momentum.layers[module], settings.momentum * momentum.scale))
    if settings.error_feedback and residue is not None:
        terms.append(_term(residue.layers[module], residue.scale))
    return tuple(terms)


@dataclass(frozen=True, slots=True)
class Carried:
    """Hold what one module hands to the next round; None for what its rule does not carry."""

    momentum: Factors | None = None
    residue: Factors | None = None


def to_carry(
    summed: Sequence[Term],
    result: Factors,
    previous: Factors,
    *,
    shape: tuple[int, int],
    scale: float,
    rank: int,
    seed: int,
    settings: RuleSettings,
) -> Carried:
    """Return what a module carries of a sum and the `result` that came of it.

    `rank` is the shared adapter's, `seed` the module's own, `scale` that of `previous` and result.
    """
    rank = module_rank(shape, settings.memory_rank or rank)

    def best(terms: Sequence[Term]) -> Factors:
        found = truncate(terms, shape, rank, scale=scale, seed=seed, dtype=np.float32).factors
        return Factors(*(np.ascontiguousarray(x, np.float32) for x in (found.a, found.b)))

    end = _term(result, -scale)
    return Carried(
        best([_term(result, scale), _term(previous, -scale)]) if settings.momentum else None,
        best([*summed, end]) if settings.error_feedback else None,
    )


def remembered(carried: Mapping[str, Carried], scale: float) -> Memory:
    """Return what all modules carry, as the next round is handed it."""
    momentum = {name: found.momentum for name, found in carried.items() if found.momentum}
    residue = {name: found.residue for name, found in carried.items() if found.residue}
    return Memory(
        Adapter(momentum, scale) if momentum else None,
        Adapter(residue, scale) if residue else None,
    )


def _term(factors: Factors, weight: float) -> Term:
    return Term(factors, np.full(factors.rank, weight))
