"""What a rule carries from one round to the next, in product space and at a bounded rank.

Both are sums of products, so that they live through any change of basis between rounds:

    momentum    v = best rank-q form of ΔW⁺ − ΔW_g     adds β·v to the next sum
    residue     e = best rank-q form of sum − ΔW⁺      adds e to the next sum

The momentum is the heavy ball: β times what the last round moved. Source: FedAvgM, arXiv
1909.06335, there on dense weights; error feedback: arXiv 1901.09847. Pure functions: who keeps
`Memory` between two rounds hands it in with the `RoundView`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregator.merge.lowrank import module_seed, truncate
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


class Remembering:
    """Gather what the next round is to be handed, module by module."""

    def __init__(self, view: RoundView, settings: RuleSettings) -> None:
        self._view = view
        self._settings = settings
        self._momentum: dict[str, Factors] = {}
        self._residue: dict[str, Factors] = {}

    def add(self, module: str, summed: Sequence[Term], result: Factors) -> None:
        """Take in a module's terms and the factors that came of their sum."""
        previous, scale = self._view.previous.layers[module], self._view.previous.scale
        if self._settings.momentum:
            moved = [_term(result, scale), _term(previous, -scale)]
            self._momentum[module] = self._best(module, moved)
        if self._settings.error_feedback:
            self._residue[module] = self._best(module, [*summed, _term(result, -scale)])

    def memory(self) -> Memory:
        """Return all that was gathered; what the settings do not want is None."""
        scale = self._view.previous.scale
        return Memory(
            Adapter(self._momentum, scale) if self._settings.momentum else None,
            Adapter(self._residue, scale) if self._settings.error_feedback else None,
        )

    def _best(self, module: str, terms: Sequence[Term]) -> Factors:
        shape = self._view.shapes[module]
        rank = module_rank(shape, self._settings.memory_rank or self._view.rank)
        seed = module_seed(self._view.seed, module)
        scale = self._view.previous.scale
        best = truncate(terms, shape, rank, scale=scale, seed=seed, dtype=np.float32).factors
        return Factors(*(np.ascontiguousarray(x, np.float32) for x in (best.a, best.b)))


def _term(factors: Factors, weight: float) -> Term:
    return Term(factors, np.full(factors.rank, weight))
