"""The named merge rules: one line each, a weighting x a combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType

import numpy as np

from aggregator.errors import BadRuleSettings, MergeError, UnknownRule
from aggregator.merge.combine import (
    Combination,
    Contribution,
    LayerUpdates,
    factor_average,
    product,
    stack,
)
from aggregator.merge.lowrank import SPLITS, Float64Array, Split, module_seed
from aggregator.merge.round_view import Merged, RoundView, check
from aggregator.merge.weighting import (
    Weighting,
    among_holders,
    anchored_by_previous,
    norm_share,
    sample_share,
)
from protocol.adapter import Adapter, Factors

Settings = Mapping[str, object]
NO_SETTINGS: Settings = MappingProxyType({})
ENTRY_POINTS = "tunefleet.rules"

MergeRule = Callable[[RoundView, Settings], Merged]
"""What an entry point of the group `tunefleet.rules` has to name; a `Rule` is one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Merge by a weighting and a combination.

    Settings: `split`, how singular values are shared out between the factors of a product:
    `left` (the default) or `balanced`, see `lowrank.split_factors`.
    """

    weighting: Weighting
    combination: Combination

    def __call__(self, view: RoundView, settings: Settings) -> Merged:
        """Merge module by module: memory is that of the largest module."""
        split = read_split(settings)
        shares = self.weighting.share(view)
        layers: dict[str, Factors] = {}
        norms: list[float] = []
        residuals: list[float] = []
        for module in view.shapes:
            combined = self.combination(self._layer(view, module, shares, split))
            layers[module] = as_float32(combined.factors, module)
            norms.append(combined.norm)
            residuals.append(combined.residual)
        weights: dict[str, float] = {}
        for update, share in zip(view.updates, shares, strict=True):  # a device may come twice
            weights[update.device] = weights.get(update.device, 0.0) + float(share)
        total = float(np.linalg.norm(norms))
        residual = float(np.linalg.norm(residuals)) / total if total else 0.0
        return Merged(Adapter(layers, view.previous.scale), weights, residual)

    def _layer(
        self, view: RoundView, module: str, shares: Float64Array, split: Split
    ) -> LayerUpdates:
        """Gather the contributions to one module; the previous global is one if it weighs."""
        columns = self.weighting.spread(view, module, shares)
        contributions = [
            Contribution(u.adapter.layers[module], u.directions[module], w, u.adapter.scale)
            for u, w in zip(view.updates, columns.devices, strict=True)
        ]
        previous, scale = view.previous.layers[module], view.previous.scale
        if columns.previous.any():
            every = np.arange(previous.rank)
            contributions.append(Contribution(previous, every, columns.previous, scale))
        return LayerUpdates(
            view.shapes[module],
            previous.rank,
            scale,
            tuple(contributions),
            split,
            module_seed(view.seed, module),
        )


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "fedavg": Rule(Weighting(sample_share), factor_average),
        "hetlora": Rule(Weighting(norm_share), factor_average),
        "flexlora": Rule(Weighting(sample_share), product),
        "anchored": Rule(Weighting(sample_share, anchored_by_previous), product),
        "segment": Rule(Weighting(sample_share, among_holders), product),
        "flora": Rule(Weighting(sample_share), stack),
    }
)


def merge(rule: str, view: RoundView, *, settings: Settings = NO_SETTINGS) -> Merged:
    """Merge a round by a named rule.

    Raises:
        UnknownRule: the name is neither in `RULES` nor an installed entry point.
        BadRuleSettings: the rule has no such setting, or cannot use its value.
        MergeError: the round cannot be merged; where one update is to blame it is named.
    """
    found = find_rule(rule)
    check(view)
    return found(view, settings)


def find_rule(name: str) -> MergeRule:
    """Return a rule by its exact name: a built-in one, else one of group `tunefleet.rules`.

    Raises:
        UnknownRule: there is none of that name.
        MergeError: an entry point has the name, but what it loads cannot be called.
    """
    if name in RULES:
        return RULES[name]
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        raise UnknownRule(name, [*RULES, *sorted(installed)])
    loaded: object = installed[name].load()
    if not callable(loaded):
        raise MergeError(f"rule {name!r} ({installed[name].value}) is not a function")
    return loaded


def read_split(settings: Settings) -> Split:
    """Return the split that the settings name, `left` where they name none.

    Raises:
        BadRuleSettings: there is another setting, or another split.
    """
    if strange := sorted(set(settings) - {"split"}):
        raise BadRuleSettings(f"the rule has no setting {strange[0]!r}; it has 'split'")
    wanted = settings.get("split", "left")
    for split in SPLITS:
        if split == wanted:
            return split
    raise BadRuleSettings(f"split must be one of {', '.join(SPLITS)}, not {wanted!r}")


def as_float32(factors: Factors, module: str) -> Factors:
    """Return factors in the type in which they travel.

    Raises:
        MergeError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        a, b = factors.a.astype(np.float32), factors.b.astype(np.float32)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise MergeError("the merged values are too large for float32", module=module)
    return Factors(a, b)
