"""A device has one vote, however many updates it sent: caps, Krum and the like count devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import RoundView, Update, merge
from aggregator.merge.voters import voters_of
from protocol.adapter import Adapter, Factors
from tests.aggregator.merge.dense_rounds import assert_best, change, flat_change
from tests.aggregator.merge.made_rounds import Dense, dense, draw, rounds


def of_devices(view: RoundView, names: list[str]) -> RoundView:
    """Return a round with its updates sent by these."""
    updates = [replace(u, device=name) for u, name in zip(view.updates, names, strict=True)]
    return replace(view, updates=updates)


def near_and_far(names: list[str], far: str) -> RoundView:
    """Return a round in which all move alike, but for one that moves the other way and farther."""
    rng, shape = np.random.default_rng(0), (12, 10)
    held = draw(rng, shape, 4)
    way = rng.standard_normal(held.b.shape)
    updates = []
    for name in names:
        part = -3.0 if name == far else 1 + 0.01 * rng.standard_normal()
        moved = Factors(held.a, np.asarray(held.b + part * way, np.float32))
        updates.append(Update(name, Adapter({"m": moved}, 1.0), {"m": np.arange(4)}, 10, {}))
    return RoundView(Adapter({"m": held}, 1.0), updates, {"m": shape}, 4, 0)


@pytest.mark.parametrize("cap", [0.3, 0.4, 0.45])
def test_a_cap_is_on_a_device_and_not_on_each_of_its_updates(cap: float) -> None:
    view = near_and_far(["d0", "d0", "d2", "d3"], "nobody")
    merged = merge("anchored", view, settings={"cap": cap})
    assert merged.weights["d0"] == pytest.approx(cap)
    assert merged.weights["d2"] == pytest.approx(min(cap, (1 - cap) / 2))


@pytest.mark.parametrize("given_", [{"byzantine": 1}, {"byzantine": 0, "opposed": 0.2}])
def test_a_liar_of_three_updates_is_one_device(given_: dict[str, Any]) -> None:
    view = near_and_far(["liar", "a", "liar", "b", "c", "liar", "d"], "liar")
    merged = merge("krum", view, settings=given_)
    assert merged.weights == pytest.approx({"liar": 0, **dict.fromkeys("abcd", 0.25)})
    assert merged.warnings == ()


def test_equal_shares_and_the_median_are_those_of_devices() -> None:
    sent = ["liar", "liar", "liar", "a", "b"]
    honest = near_and_far(sent, "nobody")
    equal = merge("anchored", honest, settings={"weights": "equal"}).weights
    assert equal == pytest.approx(dict.fromkeys(("liar", "a", "b"), 1 / 3))
    assert merge("geomed", near_and_far(sent, "liar")).weights["liar"] < 0.1


def test_too_few_devices_are_said_where_there_are_updates_enough() -> None:
    view = near_and_far(["a", "a", "b", "b", "c"], "nobody")
    (said,) = merge("krum", view).warnings
    assert said.startswith("krum leaves nobody out of 3 devices; that takes 5")
    (said,) = merge("anchored", view, settings={"opposed": 0.2}).warnings
    assert said == "opposed = 0.2 leaves nobody out of 3 devices; that takes 5"


def test_who_has_no_share_is_none_of_those_of_whom_some_are_left_out() -> None:
    view = near_and_far(["a", "b", "c", "d", "e", "f", "g"], "c")
    gain = {"train_loss_before": 2.0, "train_loss_after": 1.0}
    none = {"train_loss_before": 1.0, "train_loss_after": 1.0}
    told = [replace(u, metrics=gain if u.device in "abc" else none) for u in view.updates]
    given_ = {"weights": "loss-reduction", "opposed": 0.3}
    merged = merge("anchored", replace(view, updates=told), settings=given_)
    assert merged.weights == pytest.approx(
        {**dict.fromkeys("abc", 1 / 3), **dict.fromkeys("defg", 0)}
    )
    assert merged.warnings == ("opposed = 0.3 leaves nobody out of 3 devices; that takes 4",)


def mean_changes(view: RoundView, shares: Dense) -> tuple[list[str], Dense]:
    """Return devices, and the mean of each one's changes by its updates' shares."""
    names = sorted({u.device for u in view.updates})
    points = []
    for name in names:
        own = [k for k, u in enumerate(view.updates) if u.device == name]
        weights = shares[own] / shares[own].sum()
        points.append(
            sum(w * flat_change(view.updates[k], view) for w, k in zip(weights, own, strict=True))
        )
    return names, np.array(points)


@given(view=rounds(9), seed=st.integers(0, 99), byzantine=st.sampled_from([0, 1, 2]))
@settings(max_examples=60, deadline=None)
def test_krum_of_devices_equals_the_oracle(view: RoundView, seed: int, byzantine: int) -> None:
    rng = np.random.default_rng(seed)
    view = of_devices(view, [f"d{n}" for n in rng.integers(0, 5, len(view.updates))])
    more = [replace(u, examples=u.examples + 1) for u in view.updates]  # nobody has none
    view = replace(view, updates=more)
    merged = merge("krum", view, settings={"byzantine": byzantine, "weights": "samples"})
    n = np.array([float(u.examples) for u in view.updates])
    n /= n.sum()
    names, points = mean_changes(view, n)
    count = len(names)
    f = min(byzantine, max((count - 3) // 2, 0))
    squares = ((points[:, None] - points) ** 2).sum(axis=2)
    scores = [sum(sorted(np.delete(squares[k], k))[: max(count - f - 2, 0)]) for k in range(count)]
    order = sorted(range(count), key=lambda k: scores[k])
    if f and scores[order[count - f]] - scores[order[count - f - 1]] < 1e-6 * (1 + max(scores)):
        return  # a tie
    stays = {names[k] for k in order[: count - f]}
    kept = np.array([u.device in stays for u in view.updates]) * n
    kept /= kept.sum()
    for device in names:
        own = sum(w for w, u in zip(kept, view.updates, strict=True) if u.device == device)
        assert merged.weights[device] == pytest.approx(own, abs=1e-9)
    wanted = {
        module: dense(view.previous.layers[module], view.previous.scale)
        + sum(w * change(u, view, module) for w, u in zip(kept, view.updates, strict=True))
        for module in view.shapes
    }
    assert_best(merged.adapter, wanted, view)


def test_updates_of_a_device_without_a_share_count_alike() -> None:
    view = near_and_far(["a", "a", "b"], "nobody")
    voters = voters_of(view, np.array([0.0, 0.0, 1.0]))
    assert voters.names == ("a", "b")
    np.testing.assert_allclose(voters.parts, [[0.5, 0], [0.5, 0], [0, 1]])
    np.testing.assert_allclose(voters.of_updates(np.array([0.4, 0.6])), [0.2, 0.2, 0.6])
