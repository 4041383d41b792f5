"""What a built-in rule does: a weighting x a combination, module by module, on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import MergeError
from aggregator.merge.carried import Carried, carried_terms, remembered, to_carry
from aggregator.merge.combine import Combination, Contribution, LayerUpdates
from aggregator.merge.lowrank import module_seed
from aggregator.merge.round_view import Merged, RoundView
from aggregator.merge.settings import RuleSettings, Settings, read_settings
from aggregator.merge.sums import Term
from aggregator.merge.votes import Votes, cast_votes, counted_columns
from aggregator.merge.weighting import Weighting
from protocol.adapter import Adapter, Factors


@dataclass(frozen=True, slots=True)
class ModuleTask:
    """Hold all that merging one module takes; `rank` is that of the shared adapter.

    Pickled, it has the numbers of its updates: whoever works it out needs nothing else.
    """

    module: str
    layer: LayerUpdates
    combination: Combination
    previous: Factors
    rank: int
    settings: RuleSettings


@dataclass(frozen=True, slots=True)
class MergedModule:
    """Hold one module's result in float32; `norm` and `residual` as in `Combined`."""

    factors: Factors
    norm: float
    residual: float
    carried: Carried


def merge_module(task: ModuleTask) -> MergedModule:
    """Merge one module: a pure function, for any engine to call anywhere.

    Raises:
        MergeError: the module cannot be merged.
    """
    layer = task.layer
    combined = task.combination(layer)
    factors = as_float32(combined.factors, task.module)
    norm, residual = combined.norm, combined.residual
    del combined  # it may be in float64
    carried = to_carry(
        layer.terms,
        factors,
        task.previous,
        shape=layer.shape,
        scale=layer.scale,
        rank=task.rank,
        seed=layer.seed,
        settings=task.settings,
    )
    return MergedModule(factors, norm, residual, carried)


@dataclass(frozen=True, slots=True)
class Rule:
    """Merge by a weighting and a combination; see `settings` for what a job may say to it.

    `momentum` is the rule's own, where a job says nothing of it.
    """

    weighting: Weighting
    combination: Combination
    momentum: float = 0.0

    def read(self, settings: Settings) -> RuleSettings:
        """Return the settings that a job gives the rule, checked.

        Raises:
            BadRuleSettings: the rule has no such setting, or cannot use its value.
        """
        robust = self.weighting.robust
        kind = robust.settings if robust else RuleSettings
        return read_settings(kind, {"momentum": self.momentum, **settings})

    def __call__(self, view: RoundView, settings: Settings, engine: Engine = IN_PROCESS) -> Merged:
        """Merge module by module: memory is that of the largest module, or of those under way."""
        wanted = self.read(settings)
        votes = cast_votes(view, self.weighting, wanted)
        tasks = (self._task(view, module, votes, wanted) for module in view.shapes)
        found: dict[str, MergedModule] = {}
        for module, merged in zip(view.shapes, engine.map(merge_module, tasks), strict=True):
            found[module] = merged
        weights: dict[str, float] = {}
        for update, part in zip(view.updates, votes.shares * votes.counted, strict=True):
            weights[update.device] = weights.get(update.device, 0.0) + float(part)  # it came twice
        scale = view.previous.scale
        total = float(np.linalg.norm([merged.norm for merged in found.values()]))
        lost = float(np.linalg.norm([merged.residual for merged in found.values()]))
        return Merged(
            Adapter({module: merged.factors for module, merged in found.items()}, scale),
            weights,
            lost / total if total else 0.0,
            votes.warnings,
            remembered({module: merged.carried for module, merged in found.items()}, scale),
        )

    def _task(
        self, view: RoundView, module: str, votes: Votes, settings: RuleSettings
    ) -> ModuleTask:
        layer = self._layer(view, module, votes, settings)
        previous = view.previous.layers[module]
        return ModuleTask(module, layer, self.combination, previous, view.rank, settings)

    def _layer(
        self, view: RoundView, module: str, votes: Votes, settings: RuleSettings
    ) -> LayerUpdates:
        """Gather the contributions to one module; the previous global is one if it weighs."""
        columns = counted_columns(
            self.weighting.spread(view, module, votes.shares), votes.counted, view, module
        )
        contributions = []
        for update, weights in zip(view.updates, columns.devices, strict=True):
            own, at = update.adapter, update.directions[module]
            read = partial(own.layers.__getitem__, module)
            contributions.append(Contribution(read, at, weights, own.scale))
        previous, scale = view.previous.layers[module], view.previous.scale
        if columns.previous.any():
            every = np.arange(previous.rank)
            contributions.append(Contribution(previous, every, columns.previous, scale))
        return LayerUpdates(
            view.shapes[module],
            previous.rank,
            scale,
            tuple(contributions),
            settings.split,
            module_seed(view.seed, module),
            (*_moved_terms(view, module, votes), *carried_terms(view, module, settings)),
            previous.a if view.trained == "B" else None,
            previous.b if view.trained == "A" else None,
        )


def _moved_terms(view: RoundView, module: str, votes: Votes) -> Iterator[Term]:
    """Yield p_k·c_k·Δ_k of each device whose change lies beside today's version (`rebased`)."""
    for update, weight in zip(view.updates, votes.shares * votes.counted, strict=True):
        if update.moved is not None and weight:
            read = partial(update.moved.layers.__getitem__, module)
            yield Term(read, np.full(update.moved.ranks[module], weight))


def as_float32(factors: Factors, module: str) -> Factors:
    """Return factors in the type in which they travel.

    Raises:
        MergeError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        a, b = (np.ascontiguousarray(x, np.float32) for x in (factors.a, factors.b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise MergeError("the merged values are too large for float32", module=module)
    return Factors(a, b)
