"""Rules of other packages: found by entry point, their results checked, their errors said by name.

Whatever such a rule does, the aggregator goes on or says in one line which rule is to blame, and no
version is committed that no device could read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import TypeVar

import numpy as np

from aggregator.engine import IN_PROCESS, Engine
from aggregator.errors import AggregatorError, MergeError
from aggregator.merge.round_view import Memory, Merged, RoundView, check
from aggregator.merge.rule import Rule, as_float32
from aggregator.merge.settings import Settings
from protocol.adapter import Adapter, Factors

ENTRY_POINTS = "tunefleet.rules"

MergeRule = Callable[[RoundView, Settings], Merged]
"""What an entry point of the group `tunefleet.rules` has to name; a `Rule` is one.

One that has a method `read` is asked by it, when a job is read, whether it can use the job's
settings: it raises `BadRuleSettings` if not.
"""
T = TypeVar("T")
RAISED = (Exception, SystemExit)
"""What another's code may raise and a daemon goes on; not Ctrl-C, which is the operator's."""


def installed_names() -> set[str]:
    """Return the names of the rules that other packages bring."""
    return set(_installed())


def installed_rule(name: str) -> MergeRule | None:
    """Return a rule of another package by its exact name, or None.

    Raises:
        MergeError: there is one, and what it names can't be loaded or is no rule; or two packages
            bring one of that name.
    """
    if not (points := _installed().get(name)):
        return None
    point = points[0]
    if len(points) > 1:
        both = " and ".join(sorted(point.value for point in points))
        raise MergeError(f"rule {name!r} comes from two packages, {both}: remove one of them")
    where = f"rule {name!r} ({point.value})"
    try:
        loaded: object = point.load()
    except RAISED as error:  # another's code: whatever it raises is said in one line
        raise MergeError(
            f"{where} cannot be loaded: {told(error)}; mend or remove the package that brings it"
        ) from error
    if isinstance(loaded, Rule):
        return ForeignRule(loaded.weighting, loaded.combination, loaded.momentum, where)
    if not callable(loaded) or isinstance(loaded, type):
        raise MergeError(f"{where} is not a function")
    return Foreign(where, loaded)


def _installed() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        same = found.setdefault(point.name, [])
        if point.value not in {other.value for other in same}:
            same.append(point)
    return found


@dataclass(frozen=True, slots=True)
class ForeignRule(Rule):
    """Merge by another's weighting and combination; `where` names it."""

    where: str = ""

    def __call__(self, view: RoundView, settings: Settings, engine: Engine = IN_PROCESS) -> Merged:
        """Merge by the rule."""
        merged = _named(self.where, lambda: Rule.__call__(self, view, settings, engine))
        return checked(self.where, view, merged)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Merge by another's function."""

    where: str
    rule: MergeRule

    def read(self, settings: Settings) -> None:
        """Ask the rule whether it can use the settings of a job, if it says so before a merge.

        Raises:
            BadRuleSettings: it can't.
        """

        def ask() -> None:
            if (read := getattr(self.rule, "read", None)) is not None:
                read(settings)

        _named(self.where, ask)

    def __call__(self, view: RoundView, settings: Settings) -> Merged:
        """Merge by the rule."""
        return checked(self.where, view, _named(self.where, lambda: self.rule(view, settings)))


def _named(where: str, call: Callable[[], T]) -> T:
    """Call another's code; what it raises is said in its name; other errors of ours say enough."""
    try:
        return call()
    except MergeError as error:
        why = f"{where}: {error.why}"
        raise MergeError(why, device=error.device, module=error.module) from error
    except AggregatorError:
        raise
    except RAISED as error:
        raise MergeError(f"{where} failed: {told(error)}") from error


def checked(where: str, view: RoundView, merged: object) -> Merged:
    """Return a result in the types in which it is stored and travels.

    Raises:
        MergeError: it is no result of this round; what is wrong with it is said in the rule's name.
    """
    if not isinstance(merged, Merged):
        raise MergeError(f"{where} returned {type(merged).__name__}, not Merged")
    try:
        return _result(view, merged)
    except MergeError as error:
        why = str(error).removeprefix("cannot merge: ")
        raise MergeError(f"{where} returned what is no result: {why}") from error
    except RAISED as error:  # to look at it is to run another's code
        raise MergeError(f"{where} returned what can't be read: {told(error)}") from error


def _result(view: RoundView, merged: Merged) -> Merged:
    if not isinstance(memory := merged.memory, Memory):
        raise MergeError(f"its memory is of type {type(memory).__name__}, not Memory")
    result = replace(
        merged,
        adapter=_adapter(merged.adapter, view),
        weights=_weights(merged.weights, view),
        residual=_number(merged.residual, "residual"),
        warnings=_warnings(merged.warnings),
        memory=Memory(*(a and _adapter(a, view) for a in (memory.momentum, memory.residue))),
    )
    check(replace(view, previous=result.adapter, memory=result.memory))
    return result


def _adapter(adapter: object, view: RoundView) -> Adapter:
    """Return an adapter in float32; names, shapes and ranks are for `check` to look at."""
    if not isinstance(adapter, Adapter):
        raise MergeError(f"it is of type {type(adapter).__name__}, not an Adapter")
    if not isinstance(adapter.layers, Mapping):
        raise MergeError(f"its layers are of type {type(adapter.layers).__name__}, not by module")
    scale = _number(adapter.scale, "scale")
    if scale != view.previous.scale:
        raise MergeError(
            f"its scale is {scale:g}, and the job's {view.previous.scale:g}: multiply B by the "
            "quotient and give view.previous.scale"
        )
    layers = {}
    for module, factors in adapter.layers.items():
        for side in ("a", "b"):
            values = getattr(factors, side, None)
            if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
                what = getattr(values, "dtype", type(values).__name__)
                raise MergeError(f"{side.upper()} is {what}, not an array of floats", module=module)
        if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
            raise MergeError("it has NaN or infinite values", module=module)
        layers[module] = as_float32(Factors(factors.a, factors.b), module)
    return Adapter(layers, scale)


def _weights(weights: object, view: RoundView) -> dict[str, float]:
    """Return the share of each device of the round that has one."""
    if not isinstance(weights, Mapping):
        raise MergeError(f"its weights are of type {type(weights).__name__}, not by device")
    if strange := sorted(set(map(str, weights)) - {update.device for update in view.updates}):
        raise MergeError(f"it has a weight for {strange[0]!r}, which sent nothing")
    return {device: _number(share, f"weight of {device}") for device, share in weights.items()}


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise MergeError(f"its {what} is {value!r}, not a number of 0 or more")
    return float(value)


def _warnings(warnings: object) -> tuple[str, ...]:
    if isinstance(warnings, str) or not isinstance(warnings, (tuple, list)):
        raise MergeError(f"its warnings are of type {type(warnings).__name__}, not texts")
    return tuple(" ".join(str(warning).split()) for warning in warnings)


def told(error: BaseException) -> str:
    """Return an error of unknown origin in one line."""
    try:
        said = str(error)
    except RAISED:
        said = "it can't say why"
    return " ".join(f"{type(error).__name__}: {said}".split())
