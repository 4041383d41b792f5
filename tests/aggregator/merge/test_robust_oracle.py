"""Geometric median and Multi-Krum against dense float64, and the Gram that they read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregator.errors import MergeError
from aggregator.merge import RoundView, Update, merge
from aggregator.merge.lowrank import gram
from aggregator.merge.robust import geometric_median, krum
from aggregator.merge.round_view import change_norms, changed
from aggregator.merge.settings import GeomedSettings, KrumSettings
from protocol.adapter import Adapter, Factors
from tests.aggregator.merge.dense_rounds import assert_best, change, flat_change
from tests.aggregator.merge.made_rounds import Dense, dense, draw, rounds


def weighted_changes(view: RoundView, weights: Dense) -> dict[str, Dense]:
    """Return ΔW_g + Σw·(ΔW_k − ΔW_g in the directions of k) of each module."""
    return {
        module: dense(view.previous.layers[module], view.previous.scale)
        + sum(w * change(u, view, module) for w, u in zip(weights, view.updates, strict=True))
        for module in view.shapes
    }


def dense_median(points: Dense, p: Dense, nearest: float) -> Dense:
    """Return the smoothed geometric median by gradient steps of its own length (Weiszfeld)."""
    z = p @ points
    for _ in range(5000):
        pull = p / np.maximum(np.linalg.norm(points - z, axis=1), nearest)
        z = (pull / pull.sum()) @ points
    return z


@given(view=rounds(8), clip=st.sampled_from([None, "median", 1.0]))
@settings(max_examples=60, deadline=None)
def test_geomed_equals_the_oracle(view: RoundView, clip: Any) -> None:
    merged = merge("geomed", view, settings={"clip": clip, "iterations": 5000, "weights": "equal"})
    changes = np.array([flat_change(u, view) for u in view.updates])
    norms = np.linalg.norm(changes, axis=1)
    counted = np.ones(len(changes))
    if clip is not None:
        limit = np.median(norms) if clip == "median" else clip
        counted = np.array([min(1.0, limit / x) if x > 1e-12 else 1.0 for x in norms])
    points = changes * counted[:, None]
    p = np.full(len(points), 1 / len(points))
    nearest = max(1e-6 * float(np.median(np.linalg.norm(points, axis=1))), 1e-150)
    votes = np.array([*merged.weights.values()])  # of whole changes, so that clipping is in them
    ours, wanted = votes @ changes, dense_median(points, p, nearest)
    distance = [p @ np.linalg.norm(points - z, axis=1) for z in (ours, wanted)]
    assert distance[0] <= distance[1] * (1 + 1e-4) + 1e-6 * nearest
    assert_best(merged.adapter, weighted_changes(view, votes), view)


@given(view=rounds(9), byzantine=st.sampled_from([0, 1, 2, 0.2, 0.4]))
@settings(max_examples=60, deadline=None)
def test_krum_equals_the_oracle(view: RoundView, byzantine: float) -> None:
    merged = merge("krum", view, settings={"byzantine": byzantine})
    points = np.array([flat_change(u, view) for u in view.updates])
    k = len(points)
    f = byzantine if isinstance(byzantine, int) else int(byzantine * k)
    too_small = isinstance(byzantine, float) and k < max(5, round(1 / byzantine))
    assert bool(merged.warnings) == (too_small or (k < 2 * f + 3 and f > 0))
    f = min(f, max((k - 3) // 2, 0))
    scores = []
    for i in range(k):
        squares = sorted(float(np.sum((points[i] - points[j]) ** 2)) for j in range(k) if j != i)
        scores.append(sum(squares[: max(k - f - 2, 0)]))
    ordered = sorted(scores)
    if f:
        assume(ordered[k - f] - ordered[k - f - 1] > 1e-6 * (1 + ordered[-1]))
    stay = np.array([score <= ordered[k - f - 1] * (1 + 1e-7) for score in scores], float)
    np.testing.assert_allclose([*merged.weights.values()], stay / stay.sum(), atol=1e-9)
    assert_best(merged.adapter, weighted_changes(view, stay / stay.sum()), view)


@given(view=rounds())
@settings(max_examples=40, deadline=None)
def test_changes_are_those_of_the_products(view: RoundView) -> None:
    points = np.array([flat_change(u, view) for u in view.updates])
    ours = gram([changed(u, view.previous) for u in view.updates])
    np.testing.assert_allclose(ours, points @ points.T, atol=1e-9 * (1 + np.abs(points).max()) ** 2)
    np.testing.assert_allclose(change_norms(view), np.linalg.norm(points, axis=1), atol=1e-6)


def test_the_gram_of_small_changes_keeps_its_digits() -> None:
    """At 1e-6 of the global the difference of two norms would have lost all but four digits."""
    rng = np.random.default_rng(0)
    shape = (40, 30)
    held = Adapter({"m": draw(rng, shape, 4)}, 2.0)
    whole = held.layers["m"]
    at = {"m": np.arange(4)}
    moves = [
        Factors(
            whole.a.astype(np.float64) + 1e-9 * rng.standard_normal(whole.a.shape),
            whole.b.astype(np.float64) + 1e-9 * rng.standard_normal(whole.b.shape),
        )
        for _ in range(3)
    ]
    updates = [Update(f"d{k}", Adapter({"m": f}, 2.0), at, 1, {}) for k, f in enumerate(moves)]
    exact = []
    for f in moves:
        da, db = f.a - whole.a.astype(np.float64), f.b - whole.b.astype(np.float64)
        exact.append((2.0 * (db @ f.a + whole.b.astype(np.float64) @ da)).ravel())
    wanted = np.array(exact) @ np.array(exact).T
    ours = gram([changed(u, held) for u in updates])
    np.testing.assert_allclose(ours, wanted, rtol=1e-9)
    both = gram([updates[0].adapter, held])
    lost = both[0, 0] + both[1, 1] - 2 * both[0, 1]
    assert abs(lost - wanted[0, 0]) > 1e-3 * wanted[0, 0]


@given(ranks=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_a_gram_of_one_wild_device_keeps_the_others(ranks: list[int]) -> None:
    rng = np.random.default_rng(len(ranks))
    layers = [draw(rng, (9, 8), r) for r in ranks]
    plain = gram([Adapter({"m": f}, 1.0) for f in layers])
    wild = Adapter({"m": draw(rng, (9, 8), 2)}, 1e12)
    among = gram([wild, *(Adapter({"m": f}, 1.0) for f in layers)])
    np.testing.assert_allclose(among[1:, 1:], plain, rtol=1e-12, atol=1e-12)


# ---- by hand -----------------------------------------------------------------------------------


def by_points(points: list[list[float]]) -> Dense:
    x = np.array(points, float)
    return x @ x.T


def third(count: int) -> Dense:
    return np.full(count, 1 / count)


def names(count: int) -> list[str]:
    return [f"d{k}" for k in range(count)]


def test_the_median_of_a_line_is_its_middle_point() -> None:
    gram_ = by_points([[0], [1], [1000]])
    weights, _ = geometric_median(gram_, third(3), names(3), GeomedSettings())
    assert weights @ np.array([0, 1, 1000]) == pytest.approx(1.0, abs=1e-2)
    heavy = np.array([0.6, 0.2, 0.2])
    weights, _ = geometric_median(gram_, heavy, names(3), GeomedSettings())
    assert weights @ np.array([0, 1, 1000]) == pytest.approx(0.0, abs=1e-2)


@pytest.mark.parametrize("points", [[[0.0]] * 3, [[2.0]] * 3, [[0.0]], [[5.0]], [[0.0], [5.0]]])
def test_no_distance_at_all_leaves_the_shares(points: list[list[float]]) -> None:
    count = len(points)
    weights, _ = geometric_median(by_points(points), third(count), names(count), GeomedSettings())
    np.testing.assert_allclose(weights, third(count))


def test_a_majority_at_one_point_is_the_median() -> None:
    weights, _ = geometric_median(
        by_points([[0.0], [0.0], [0.0], [7.0]]), third(4), names(4), GeomedSettings()
    )
    assert weights[3] < 1e-6
    assert weights.sum() == pytest.approx(1)


def test_krum_leaves_out_the_far_ones_and_ties_go_by_name() -> None:
    points = [[0.0], [0.1], [50.0], [-0.1], [0.2], [-60.0], [0.05]]
    weights, warnings = krum(by_points(points), third(7), names(7), KrumSettings(byzantine=2))
    assert warnings == []
    np.testing.assert_allclose(weights, [0.2, 0.2, 0, 0.2, 0.2, 0, 0.2])
    same = by_points([[1.0]] * 5)
    weights, _ = krum(same, third(5), ["e", "d", "c", "b", "a"], KrumSettings(byzantine=1))
    np.testing.assert_allclose(weights, [0, 0.25, 0.25, 0.25, 0.25])
    nothing = np.array([1.0, 0, 0, 0, 0])
    far = by_points([[9.0], [0.0], [0.0], [0.0], [0.0]])
    weights, _ = krum(far, nothing, names(5), KrumSettings(byzantine=1))
    np.testing.assert_allclose(weights, [0, 0.25, 0.25, 0.25, 0.25])


def test_krum_in_a_small_round_says_what_it_withstands() -> None:
    weights, warnings = krum(
        by_points([[0.0], [1.0], [2.0], [90.0]]), third(4), names(4), KrumSettings(byzantine=1)
    )
    np.testing.assert_allclose(weights, third(4))
    assert warnings == [
        "krum against 1 dishonest devices needs 5, the round has 4: it withstands 0; "
        "raise policy.quorum, in buffered rounds policy.buffer"
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_share_of_a_round_that_is_nobody_is_said(count: int) -> None:
    points, shares = by_points([[float(k)] for k in range(count)]), third(count)
    weights, warnings = krum(points, shares, names(count), KrumSettings())
    np.testing.assert_allclose(weights, shares)
    assert warnings == [
        f"krum leaves nobody out of {count} devices; that takes 5: "
        "raise policy.quorum, in buffered rounds policy.buffer"
    ]
    assert krum(points, shares, names(count), KrumSettings(byzantine=0))[1] == []


def test_opposed_says_too_that_a_round_is_too_small() -> None:
    def warnings(devices: int) -> tuple[str, ...]:
        rng, shape = np.random.default_rng(0), (5, 4)
        updates = [
            Update(f"d{k}", Adapter({"m": draw(rng, shape, 2)}, 1.0), {"m": np.arange(2)}, 1, {})
            for k in range(devices)
        ]
        view = RoundView(updates[0].adapter, updates, {"m": shape}, 2, 0)
        return merge("anchored", view, settings={"opposed": 0.2}).warnings

    assert warnings(4) == ("opposed = 0.2 leaves nobody out of 4 devices; that takes 5",)
    assert warnings(5) == ()


def test_krum_says_where_those_it_keeps_had_no_share() -> None:
    far = by_points([[9.0], [0.0], [0.0], [0.0], [0.0]])
    only_far = np.array([1.0, 0, 0, 0, 0])
    _, warnings = krum(far, only_far, names(5), KrumSettings(byzantine=1))
    assert warnings == ["those that krum keeps had no share; they count alike"]


def test_a_negative_age_is_refused() -> None:
    rng = np.random.default_rng(0)
    adapter = Adapter({"m": draw(rng, (5, 4), 2)}, 1.0)
    update = Update("late", adapter, {"m": np.arange(2)}, 1, {}, -1)
    view = RoundView(adapter, [update], {"m": (5, 4)}, 2, 0)
    with pytest.raises(MergeError, match="device late: it is -1 versions behind"):
        merge("anchored", view, settings={"staleness": True})
    half = merge("anchored", replace(view, updates=[replace(update, staleness=3)]))
    assert half.weights == {"late": 1.0}
