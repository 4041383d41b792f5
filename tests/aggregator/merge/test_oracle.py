"""Every rule against a dense float64 oracle that shares no code with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import RULES, RoundView, Update, merge
from aggregator.merge.lowrank import module_seed, revived, truncate
from aggregator.merge.round_view import completed
from aggregator.merge.sums import Dense as DenseSum
from aggregator.merge.sums import Term
from aggregator.merge.trust import personal
from protocol.adapter import Adapter, Factors, initial_adapter, module_rank
from tests.aggregator.merge.made_rounds import (
    Dense,
    best,
    dense,
    draw,
    one_module,
    rounds,
    update,
)

AVERAGES = [name for name, rule in RULES.items() if rule.weighting.robust is None]


def oracle_sum(rule: str, view: RoundView, module: str) -> tuple[Dense, Dense | None]:
    """Return the weighted sum of deltas of a rule, and the factor-averaged delta if it has one."""
    counts = np.array([float(u.examples) for u in view.updates])
    p = counts / counts.sum()
    if rule == "hetlora":
        norms = np.array(
            [
                np.sqrt(
                    sum(
                        np.linalg.norm(dense(f, u.adapter.scale)) ** 2
                        for f in u.adapter.layers.values()
                    )
                )
                for u in view.updates
            ]
        )
        p = norms / norms.sum() if norms.any() else np.full(len(norms), 1 / len(norms))
    shape, previous = view.shapes[module], view.previous.layers[module]
    total, a, b = np.zeros(shape), np.zeros(previous.a.shape), np.zeros(previous.b.shape)
    if rule == "anchored":
        total += dense(previous, view.previous.scale)
    for k, u in enumerate(view.updates):
        f, at, s = u.adapter.layers[module], u.directions[module], u.adapter.scale
        own = dense(f, s)
        if rule == "anchored":
            own = own - dense(previous.take(at), view.previous.scale)
        if rule == "segment":
            for row, h in enumerate(at):
                holders = sum(
                    counts[j] for j, v in enumerate(view.updates) if h in v.directions[module]
                )
                if holders:
                    total += counts[k] / holders * dense(f.take([row]), s)
        else:
            total += p[k] * own
        for row, h in enumerate(at):
            a[h] += p[k] * f.a[row]
            b[:, h] += p[k] * f.b[:, row].astype(float) * s / view.previous.scale
    if rule in ("fedavg", "hetlora"):
        return total, view.previous.scale * b @ a
    return total, None


@pytest.mark.parametrize("rule", AVERAGES)
@given(view=rounds(), split=st.sampled_from(["left", "balanced"]))
@settings(max_examples=100, deadline=None)
def test_rule_equals_the_dense_oracle(rule: str, view: RoundView, split: str) -> None:
    merged = merge(rule, view, settings={"split": split})
    lost, whole, summed = 0.0, 0.0, 0.0
    for module, shape in view.shapes.items():
        total, averaged = oracle_sum(rule, view, module)
        factors, held = merged.adapter.layers[module], module_rank(shape, view.rank)
        assert (factors.a.shape, factors.b.shape) == ((held, shape[1]), (shape[0], held))
        assert factors.a.dtype == factors.b.dtype == np.float32
        assert not (~factors.a.any(axis=1) & ~factors.b.any(axis=0)).any()  # no dead pair
        ours = dense(factors, merged.adapter.scale)
        adapters = [view.previous, *(u.adapter for u in view.updates)]
        parts = [float(np.linalg.norm(dense(x.layers[module], x.scale))) for x in adapters]
        size = max(float(np.linalg.norm(total)), 1e-6 * max(parts))
        if averaged is None:
            wanted = best(total, held)
            values = np.linalg.svd(total, compute_uv=False)
            if held < len(values) and values[held - 1] - values[held] > 1e-3 * values[0]:
                assert np.linalg.norm(ours - wanted) <= 1e-5 * size  # the best is unique
            error = float(np.linalg.norm(total - wanted))
            assert np.linalg.norm(total - ours) == pytest.approx(error, abs=5e-6 * size)
        else:
            error = float(np.linalg.norm(total - averaged))
            assert np.linalg.norm(ours - averaged) <= 1e-5 * (size + np.linalg.norm(averaged))
        lost, whole = float(np.hypot(lost, error)), float(np.hypot(whole, np.linalg.norm(total)))
        summed += sum(parts)
    if whole > 1e-9 * summed:  # else the oracle's own sum is nothing but rounding
        assert merged.residual == pytest.approx(lost / whole, abs=1e-5, rel=1e-5)
    assert sum(merged.weights.values()) == pytest.approx(1.0)
    assert list(merged.weights) == [u.device for u in view.updates]


@given(view=rounds(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_personal_equals_the_dense_oracle(view: RoundView, data: st.DataObject) -> None:
    count = len(view.updates)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = rng.dirichlet(np.ones(count), count)
    if data.draw(st.booleans()):
        view = replace(view, updates=[completed(u, view.previous) for u in view.updates])
    for row, result in zip(rows, personal(view, rows), strict=True):
        assert result.scale == view.previous.scale
        for module, shape in view.shapes.items():
            total = np.zeros(shape)
            for w, u in zip(row, view.updates, strict=True):
                total += w * dense(u.adapter.layers[module], u.adapter.scale)
            held = module_rank(shape, view.rank)
            error = np.linalg.norm(total - best(total, held))
            ours = dense(result.layers[module], result.scale)
            size = float(np.linalg.norm(total))
            assert np.linalg.norm(total - ours) == pytest.approx(error, abs=5e-6 * size)


@given(view=rounds())
@settings(max_examples=30, deadline=None)
def test_completed_is_the_trained_directions_over_the_frozen_rest(view: RoundView) -> None:
    for u in view.updates:
        full = completed(u, view.previous)
        for module in view.shapes:
            at, g = u.directions[module], view.previous.layers[module]
            rest = np.setdiff1d(np.arange(g.rank), at)
            wanted = dense(u.adapter.layers[module], u.adapter.scale)
            wanted = wanted + dense(g.take(rest), view.previous.scale)
            np.testing.assert_allclose(
                dense(full.adapter.layers[module], full.adapter.scale), wanted, atol=1e-4
            )
            assert full.directions[module].tolist() == list(range(g.rank))


# ---- directions, re-seeding, determinism -------------------------------------------------------


def test_a_gap_in_the_directions_is_scattered_by_index() -> None:
    gapped = update("a", [1, 4], 0)
    merged = merge("fedavg", one_module([gapped], 6)).adapter.layers["m"]
    np.testing.assert_allclose(merged.a[[1, 4]], gapped.adapter.layers["m"].a)
    np.testing.assert_allclose(merged.b[:, [1, 4]], gapped.adapter.layers["m"].b)
    assert not merged.b[:, [0, 2, 3, 5]].any()


@pytest.mark.parametrize("rule", AVERAGES)
def test_null_directions_are_reseeded_with_orthonormal_rows(rule: str) -> None:
    view = one_module([update("a", [0, 1], 0)], 6)
    if rule == "anchored":  # a previous global of rank 2 leaves the rest null
        layer = view.previous.layers["m"]
        b = np.where(np.arange(6) < 2, layer.b, 0)
        view = replace(view, previous=Adapter({"m": Factors(layer.a, b)}, 1.0))
    first, again = (merge(rule, view).adapter.layers["m"] for _ in range(2))
    new = ~first.b.any(axis=0)
    assert new.sum() == 4
    np.testing.assert_allclose(first.a[new] @ first.a[new].T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(first.a[new] @ first.a[~new].T, 0, atol=1e-5)
    np.testing.assert_array_equal(first.a, again.a)
    other = merge(rule, replace(view, seed=4)).adapter.layers["m"]
    assert np.abs(other.a[new] - first.a[new]).max() > 1e-3
    np.testing.assert_allclose(dense(other, 1), dense(first, 1))


@pytest.mark.parametrize("rule", RULES)
def test_a_round_of_zeros_merges_to_zero_and_stays_trainable(rule: str) -> None:
    shapes = {"m": (9, 8)}
    previous = initial_adapter(shapes, 5, 2.0, 0)
    at = {"m": np.arange(3)}
    updates = [Update(f"d{k}", previous.truncated(3), at, 4, {}) for k in range(2)]
    merged = merge(rule, RoundView(previous, updates, shapes, 5, 0))
    layer = merged.adapter.layers["m"]
    assert not layer.b.any()
    assert np.linalg.matrix_rank(layer.a) == 5
    assert merged.residual == 0
    assert merged.weights == {"d0": 0.5, "d1": 0.5}


def test_revived_keeps_what_can_still_be_trained() -> None:
    a, b = np.eye(4, 6), np.zeros((5, 4))
    a[2:], b[0, 2] = 0, 1.0  # rows 0 and 1 have A, row 2 has B, row 3 has neither
    result = revived(Factors(a, b), 0)
    np.testing.assert_array_equal(result.a[:3], a[:3])
    np.testing.assert_array_equal(result.b, b)
    assert np.linalg.norm(result.a[3]) == pytest.approx(1)
    assert np.abs(result.a[:2] @ result.a[3]).max() < 1e-12
    assert module_seed(0, "a") != module_seed(0, "b")


def test_a_stack_wider_than_the_module_takes_the_dense_path_to_the_same_result() -> None:
    rng = np.random.default_rng(1)
    for shape in ((24, 16), (16, 24)):
        terms = [Term(draw(rng, shape, 5), np.full(5, 0.1)) for _ in range(10)]
        whole = np.sum([0.1 * dense(t.read(), 1) for t in terms], axis=0)
        np.testing.assert_allclose(DenseSum(terms, shape, np.float64).total, whole, atol=1e-12)
        result = truncate(terms, shape, 4, scale=2.0)
        np.testing.assert_allclose(dense(result.factors, 2.0), best(whole, 4), atol=1e-10)


def test_the_scale_of_the_halves_of_a_product_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    plain = [draw(rng, (30, 28), 3) for _ in range(4)]
    skewed = [
        Factors(f.a * 10.0 ** (6 * k - 9), f.b / 10.0 ** (6 * k - 9)) for k, f in enumerate(plain)
    ]
    one, other = (
        truncate([Term(f, np.ones(3)) for f in fs], (30, 28), 5, scale=1.0)
        for fs in (plain, skewed)
    )
    np.testing.assert_allclose(dense(one.factors, 1), dense(other.factors, 1), atol=1e-4)


def test_what_nearly_cancels_is_still_resolved() -> None:
    rng = np.random.default_rng(4)
    one = draw(rng, (30, 28), 3)
    noise = rng.standard_normal(one.a.shape)
    other = Factors(one.a.astype(np.float64) + 1e-5 * noise, -one.b)
    result = truncate([Term(f, np.ones(3)) for f in (one, other)], (30, 28), 3, scale=1.0)
    wanted = -1e-5 * one.b @ noise
    assert np.linalg.norm(dense(result.factors, 1) - wanted) < 1e-3 * np.linalg.norm(wanted)
