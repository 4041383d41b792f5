"""The named merge rules: one line each, a weighting x a combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import UnknownRule
from aggregator.merge.combine import factor_average, product, stack
from aggregator.merge.installed import MergeRule, installed_names, installed_rule
from aggregator.merge.robust import GEOMED, KRUM
from aggregator.merge.round_view import Merged, RoundView, check
from aggregator.merge.rule import Rule
from aggregator.merge.settings import NO_SETTINGS, Settings
from aggregator.merge.weighting import (
    Weighting,
    among_holders,
    anchored_by_previous,
    equal_share,
    norm_share,
    sample_share,
)

MOMENTUM = 0.5
"""β of the rules that are this project's: better by measurement, see docs/results.md."""
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "fedavg": Rule(Weighting(sample_share), factor_average),
        "hetlora": Rule(Weighting(norm_share), factor_average),
        "flexlora": Rule(Weighting(sample_share), product),
        "anchored": Rule(Weighting(sample_share, anchored_by_previous), product, MOMENTUM),
        "segment": Rule(Weighting(sample_share, among_holders), product),
        "flora": Rule(Weighting(sample_share), stack),
        "geomed": Rule(Weighting(equal_share, anchored_by_previous, GEOMED), product),
        "krum": Rule(Weighting(equal_share, anchored_by_previous, KRUM), product),
    }
)


def merge(
    rule: str,
    view: RoundView,
    *,
    settings: Settings = NO_SETTINGS,
    engine: Engine = IN_PROCESS,
) -> Merged:
    """Merge a round by a named rule; `engine` works the modules of a built-in one out.

    The rule sees the updates in the order of their devices' names, so that no rounding tells in
    which order they came.

    Raises:
        EngineError: the engine can't do it.
        UnknownRule: the name is neither in `RULES` nor an installed entry point.
        BadRuleSettings: the rule has no such setting, or cannot use its value.
        MergeError: the round cannot be merged; where one update is to blame it is named.
    """
    found = find_rule(rule)
    check(view)
    by_name = sorted(view.updates, key=lambda update: (update.device, update.staleness))
    view = replace(view, updates=by_name)
    return found(view, settings, engine) if isinstance(found, Rule) else found(view, settings)


def find_rule(name: str) -> MergeRule:
    """Return a rule by its exact name: a built-in one, else one of group `tunefleet.rules`.

    Raises:
        UnknownRule: there is none of that name.
        MergeError: an entry point has the name, but what it names cannot be loaded or called.
    """
    if name in RULES:
        return RULES[name]
    if (found := installed_rule(name)) is None:
        raise UnknownRule(name, [*RULES, *sorted(installed_names() - set(RULES))])
    return found
