"""Updates, rounds, settings and rules that are refused, naming whose fault it is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

import aggregator.merge.installed as installed_module
from aggregator.errors import AggregatorError, BadRuleSettings, MergeError, UnknownRule
from aggregator.merge import RULES, Merged, RoundView, Update, merge
from aggregator.merge.weighting import sample_share
from protocol.adapter import Adapter, Factors
from tests.aggregator.merge.made_rounds import (
    BAD,
    GOOD,
    LAYER,
    one_module,
    update,
)


def broken(update_: Update, **layer: npt.NDArray[np.float32]) -> Update:
    f = update_.adapter.layers["m"]
    return replace(
        update_, adapter=Adapter({"m": Factors(layer.get("a", f.a), layer.get("b", f.b))}, 1.0)
    )


def spoiled(array: npt.NDArray[np.floating], value: float) -> npt.NDArray[np.float32]:
    copy = array.astype(np.float32)
    copy[0, 0] = value
    return copy


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "bad",
    [
        broken(BAD, a=spoiled(LAYER.a, np.nan)),
        broken(BAD, b=spoiled(LAYER.b, np.inf)),
        broken(BAD, a=LAYER.a[:1].astype(np.float32)),
        broken(BAD, b=LAYER.b[:5].astype(np.float32)),
        replace(BAD, directions={"m": np.array([0, 2])}),
        replace(BAD, directions={"m": np.array([2, 1, 0])}),
        replace(BAD, directions={"m": np.array([0, 1, 6])}),
        replace(BAD, directions={"m": np.array([-1, 0, 1])}),
        replace(BAD, directions={}),
        replace(BAD, adapter=Adapter({"m": LAYER, "n": LAYER}, 1.0)),
        replace(BAD, adapter=Adapter({}, 1.0)),
    ],
)
def test_a_bad_update_is_refused_by_device_and_module(rule: str, bad: Update) -> None:
    with pytest.raises(MergeError, match="device bad, module") as raised:
        merge(rule, one_module([GOOD, bad], 6))
    assert raised.value.device == "bad"
    assert raised.value.module in ("m", "n")


@pytest.mark.parametrize("rule", RULES)
def test_a_round_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(MergeError, match="no update"):
        merge(rule, one_module([], 6))
    with pytest.raises(MergeError, match="device bad: the scale"):
        merge(rule, one_module([replace(BAD, adapter=Adapter({"m": LAYER}, 0.0))], 6))
    with pytest.raises(MergeError, match="device bad: it counts -1"):
        merge(rule, one_module([replace(BAD, examples=-1)], 6))
    with pytest.raises(MergeError, match="module m: the shared adapter"):
        merge(rule, replace(one_module([GOOD], 6), rank=5))
    if RULES[rule].weighting.share is sample_share:
        with pytest.raises(MergeError, match="example"):
            merge(rule, one_module([replace(GOOD, examples=0)], 6))
    big = np.float32(3e38)
    huge = broken(GOOD, a=np.full_like(LAYER.a, big), b=np.full_like(LAYER.b, big))
    if RULES[rule].combination.__name__ != "factor_average":
        with pytest.raises(MergeError, match="too large"):
            merge(rule, one_module([huge], 6))


def test_a_device_that_comes_twice_has_the_sum_of_its_shares() -> None:
    view = one_module([update("a", [0], 0, 1), update("b", [0], 1, 2), update("a", [1], 2, 1)], 4)
    assert merge("flexlora", view).weights == {"a": 0.5, "b": 0.5}


def test_settings_are_checked() -> None:
    view = one_module([GOOD], 6)
    with pytest.raises(BadRuleSettings, match="'spilt'"):
        merge("flexlora", view, settings={"spilt": "left"})
    with pytest.raises(BadRuleSettings, match="split: must be 'left' or 'balanced'"):
        merge("flexlora", view, settings={"split": "right"})
    assert issubclass(BadRuleSettings, AggregatorError)


# ---- names -----------------------------------------------------------------------------------


class InstalledRule(SimpleNamespace):
    """What importlib.metadata gives for an entry point."""

    def load(self) -> object:
        return self.loaded


def test_a_rule_from_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    view = one_module([GOOD], 6)

    def mine(seen: RoundView, given: object) -> Merged:
        assert given == {"anything": 1}
        return Merged(seen.previous, {}, 0.0)

    def installed(*, group: str) -> list[InstalledRule]:
        assert group == "tunefleet.rules"
        return [
            InstalledRule(name="mine", value="x:mine", loaded=mine),
            InstalledRule(name="text", value="x:text", loaded="no function"),
        ]

    monkeypatch.setattr(installed_module, "entry_points", installed)
    merged = merge("mine", view, settings={"anything": 1})
    assert np.array_equal(merged.adapter.layers["m"].a, view.previous.layers["m"].a)
    with pytest.raises(MergeError, match="x:text"):
        merge("text", view, settings={})
    with pytest.raises(UnknownRule, match=r"'other'.*fedavg.*krum, mine, text"):
        merge("other", view)
