"""Every setting with every rule, against a dense float64 oracle that shares no code with them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.errors import BadRuleSettings
from aggregator.merge import RULES, Memory, RoundView, Update, merge
from protocol.adapter import Adapter, module_rank
from tests.aggregator.merge.dense_rounds import assert_best, change, flat_change
from tests.aggregator.merge.made_rounds import Dense, best, dense, draw, rounds

PRODUCTS = ["flexlora", "flora", "segment", "anchored"]
FACTORS = ["fedavg", "hetlora"]


def oracle_votes(view: RoundView, given: dict[str, Any], own: Dense) -> tuple[Dense, Dense]:
    """Return shares and counted parts by the definitions of docs/algorithms.md."""
    n = np.array([float(u.examples) for u in view.updates])
    n, k = n / n.sum(), len(n)
    shares = {None: own, "samples": n, "equal": np.full(k, 1 / k)}.get(given.get("weights"), own)
    if given.get("weights") == "loss-reduction":
        down = [
            u.metrics["train_loss_before"] - u.metrics["train_loss_after"] for u in view.updates
        ]
        gain = np.array([max(x, 0.0) for x in down])
        shares = gain / gain.sum() if gain.sum() else np.full(k, 1 / k)
    if given.get("weights") == "discrepancy":
        h = np.array([[u.metrics[f"tokens_{i}"] for i in range(16)] for u in view.updates])
        h = h / h.sum(axis=1)[:, None]
        fleet = sum(w * row for w, row in zip(n, h, strict=True))
        raw = [w - 0.5 * np.sqrt(((r - fleet) ** 2).sum()) + 0.1 for w, r in zip(n, h, strict=True)]
        kept = np.array([max(x, 0.0) for x in raw])
        shares = kept / kept.sum() if kept.sum() else n
    counted = np.ones(k)
    if given.get("staleness"):
        counted = np.array([(1 + u.staleness) ** -0.5 for u in view.updates])
    if clip := given.get("clip"):
        norms = np.array([np.linalg.norm(flat_change(u, view)) for u in view.updates]) * counted
        limit = np.median(norms) if clip == "median" else clip
        counted = counted * [min(1.0, limit / x) if x > 1e-12 else 1.0 for x in norms]
    if cap := given.get("cap"):
        voters = int((shares > 0).sum())
        if cap * voters <= 1:
            shares, counted = (shares > 0) / voters, counted * cap * voters
        else:  # fill by bisection: min(cap, t·p) sums to 1
            low, high = 0.0, 1e9
            for _ in range(200):
                middle = (low + high) / 2
                over = np.minimum(cap, middle * shares).sum() > 1
                low, high = (low, middle) if over else (middle, high)
            shares = np.minimum(cap, low * shares)
    return shares, counted


def own_share(rule: str, view: RoundView) -> Dense:
    n = np.array([float(u.examples) for u in view.updates])
    if rule == "hetlora":
        n = np.array(
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
        n = n if n.any() else np.ones(len(n))
    return n / n.sum()


def clipped_delta(view: RoundView, k: int, part: float, module: str, rows: list[int]) -> Dense:
    """Return device k's delta in some of its own directions, its change shortened to `part`."""
    u, g = view.updates[k], view.previous
    at = u.directions[module][rows]
    before = dense(g.layers[module].take(at), g.scale)
    after = dense(u.adapter.layers[module].take(rows), u.adapter.scale)
    return before + part * (after - before)


def oracle(rule: str, view: RoundView, given: dict[str, Any]) -> tuple[dict[str, Dense], Dense]:
    """Return the weighted sum of each module and what each device's vote is in the end."""
    p, c = oracle_votes(view, given, own_share(rule, view))
    sums = {}
    for module, shape in view.shapes.items():
        total = np.zeros(shape)
        if rule == "anchored":
            total += dense(view.previous.layers[module], view.previous.scale)
        for k, u in enumerate(view.updates):
            at = u.directions[module]
            if rule == "anchored":
                total += p[k] * c[k] * change(u, view, module)
            elif rule == "segment":
                for row, h in enumerate(at):
                    held = sum(
                        p[j] for j, v in enumerate(view.updates) if h in v.directions[module]
                    )
                    if held > 0:
                        total += p[k] / held * clipped_delta(view, k, c[k], module, [row])
            else:
                total += p[k] * clipped_delta(view, k, c[k], module, [*range(len(at))])
        sums[module] = total
    return sums, p * c


def oracle_average(view: RoundView, votes: tuple[Dense, Dense], module: str) -> Dense:
    """Return the product of the averaged factors, each moved from the previous by its part."""
    g, s = view.previous.layers[module], view.previous.scale
    a, b = np.zeros(g.a.shape), np.zeros(g.b.shape)
    for p, c, u in zip(*votes, view.updates, strict=True):
        f = u.adapter.layers[module]
        for row, h in enumerate(u.directions[module]):
            own = f.b[:, row].astype(float) * u.adapter.scale / s
            a[h] += p * (c * f.a[row].astype(float) + (1 - c) * g.a[h])
            b[:, h] += p * (c * own + (1 - c) * g.b[:, h])
    return s * b @ a


OPTIONS = st.fixed_dictionaries(
    {"split": st.sampled_from(["left", "balanced"])},
    optional={
        "weights": st.sampled_from(["samples", "equal", "loss-reduction", "discrepancy"]),
        "cap": st.sampled_from([0.1, 0.35, 0.6, 1.0]),
        "clip": st.sampled_from(["median", 0.5, 5.0]),
        "staleness": st.booleans(),
    },
)


@pytest.mark.parametrize("rule", PRODUCTS)
@given(view=rounds(), given_=OPTIONS)
@settings(max_examples=60, deadline=None)
def test_products_equal_the_oracle(rule: str, view: RoundView, given_: dict[str, Any]) -> None:
    merged = merge(rule, view, settings={**given_, "momentum": 0.0})
    sums, votes = oracle(rule, view, given_)
    assert_best(merged.adapter, sums, view)
    np.testing.assert_allclose([*merged.weights.values()], votes, atol=1e-9)
    assert merged.warnings == ()
    assert merged.memory == Memory()


@pytest.mark.parametrize("rule", FACTORS)
@given(view=rounds(), given_=OPTIONS)
@settings(max_examples=60, deadline=None)
def test_factor_averages_equal_the_oracle(
    rule: str, view: RoundView, given_: dict[str, Any]
) -> None:
    merged = merge(rule, view, settings=given_)
    votes = oracle_votes(view, given_, own_share(rule, view))
    for module in view.shapes:
        wanted = oracle_average(view, votes, module)
        ours = dense(merged.adapter.layers[module], merged.adapter.scale)
        np.testing.assert_allclose(ours, wanted, atol=1e-5 * (1 + np.linalg.norm(wanted)))


def with_memory(view: RoundView, seed: int, rank: int) -> RoundView:
    rng = np.random.default_rng(seed)
    momentum, residue = (
        Adapter({n: draw(rng, s, module_rank(s, rank)) for n, s in view.shapes.items()}, 0.5)
        for _ in range(2)
    )
    return replace(view, memory=Memory(momentum, residue))


@pytest.mark.parametrize("rule", [*PRODUCTS, *FACTORS])
@given(view=rounds(), seed=st.integers(0, 99), rank=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_momentum_and_error_feedback_equal_the_oracle(
    rule: str, view: RoundView, seed: int, rank: int
) -> None:
    view = with_memory(view, seed, rank)
    given_ = {"momentum": 0.5, "error_feedback": True, "memory_rank": rank}
    merged = merge(rule, view, settings=given_)
    v, e = merged.memory.momentum, merged.memory.residue
    sums, _ = oracle(rule, view, {})
    carried, targets = {}, {}
    for module in view.shapes:
        carried[module] = 0.5 * dense(view.memory.momentum.layers[module], 0.5)
        carried[module] += dense(view.memory.residue.layers[module], 0.5)
        targets[module] = sums[module] + carried[module]
        if rule in FACTORS:
            votes = oracle_votes(view, {}, own_share(rule, view))
            targets[module] = oracle_average(view, votes, module) + carried[module]
    assert_best(merged.adapter, targets, view)
    for module, shape in view.shapes.items():
        q = module_rank(shape, rank)
        new = dense(merged.adapter.layers[module], merged.adapter.scale)
        moved = new - dense(view.previous.layers[module], view.previous.scale)
        left = sums[module] + carried[module] - new
        for state, wanted in ((v, moved), (e, left)):
            assert state.layers[module].rank == q
            ours = dense(state.layers[module], state.scale)
            size = np.linalg.norm(new) + np.linalg.norm(carried[module]) + 1e-6
            error = np.linalg.norm(wanted - ours) - np.linalg.norm(wanted - best(wanted, q))
            assert abs(error) <= 1e-5 * size


def plain_round(seed: int, ranks: list[int], **more: Any) -> RoundView:
    """One module, well-separated spectra, no device like another."""
    rng = np.random.default_rng(seed)
    updates = [
        Update(f"d{k}", Adapter({"m": draw(rng, (24, 20), r)}, 1.0), {"m": np.arange(r)}, 9 - k, {})
        for k, r in enumerate(ranks)
    ]
    previous = Adapter({"m": draw(rng, (24, 20), 6)}, 1.0)
    return RoundView(previous, updates, {"m": (24, 20)}, 6, 0, **more)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("more", [{}, {"clip": "median"}, {"cap": 0.2}, {"momentum": 0.5}])
def test_order_does_not_matter_and_a_merge_repeats_itself(rule: str, more: dict[str, Any]) -> None:
    for seed in range(5):
        view = with_memory(plain_round(seed, [6, 2, 4, 6, 1, 3, 5]), seed, 3)
        order = np.random.default_rng(seed).permutation(len(view.updates))
        turned = replace(view, updates=[view.updates[k] for k in order])
        one, again, other = (merge(rule, v, settings=more) for v in (view, view, turned))
        assert one.weights == pytest.approx(other.weights, abs=1e-9)
        assert one.residual == pytest.approx(other.residual, abs=1e-6)
        f, g = one.adapter.layers["m"], again.adapter.layers["m"]
        assert (f.a == g.a).all() and (f.b == g.b).all()
        difference = dense(f, 1.0) - dense(other.adapter.layers["m"], 1.0)
        assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(dense(f, 1.0))


@pytest.mark.parametrize("cancels", [False, True])
def test_order_does_not_matter_where_a_sum_is_large_and_flat(cancels: bool) -> None:
    rng, shape = np.random.default_rng(0), (900, 530)
    factors = [draw(rng, shape, 16) for _ in range(60)]
    if cancels:
        factors = [f for g in factors[:30] for f in (g, replace(g, b=-0.99 * g.b))]
    updates = []
    for k, f in enumerate(factors):
        updates.append(Update(f"d{k:02}", Adapter({"m": f}, 2.0), {"m": np.arange(16)}, 1, {}))
    view = RoundView(Adapter({"m": draw(rng, shape, 16)}, 2.0), updates, {"m": shape}, 16, 0)
    one, other = (merge("flexlora", replace(view, updates=us)) for us in (updates, updates[::-1]))
    f, g = one.adapter.layers["m"], other.adapter.layers["m"]
    assert (f.a == g.a).all() and (f.b == g.b).all()


@pytest.mark.parametrize("rule", ["flexlora", "fedavg"])
def test_momentum_is_off_the_first_round_and_goes_on_in_the_next(rule: str) -> None:
    view = plain_round(0, [6, 6])
    first = merge(rule, view, settings={"momentum": 0.9, "memory_rank": 12})
    plain = merge(rule, view).adapter
    np.testing.assert_array_equal(first.adapter.layers["m"].b, plain.layers["m"].b)
    still = [
        replace(u, adapter=first.adapter, directions={"m": np.arange(6)}) for u in view.updates
    ]
    after = replace(view, previous=first.adapter, updates=still, memory=first.memory)
    second = merge(rule, after, settings={"momentum": 0.9, "memory_rank": 12}).adapter
    x, y, z = (dense(a.layers["m"], 1.0) for a in (view.previous, first.adapter, second))
    np.testing.assert_allclose(z, best(y + 0.9 * (y - x), 6), atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_only_the_rule_that_is_our_own_has_momentum_unless_it_is_given(rule: str) -> None:
    view = with_memory(plain_round(0, [6, 2, 4]), 0, 3)
    own = merge(rule, view)
    same, other = (merge(rule, view, settings={"momentum": beta}) for beta in (0.5, 0.0))
    if rule != "anchored":
        same, other = other, same
    assert (own.adapter.layers["m"].b == same.adapter.layers["m"].b).all()
    assert (own.adapter.layers["m"].b != other.adapter.layers["m"].b).any()
    assert (own.memory.momentum is None) == (rule != "anchored")


def test_error_feedback_brings_back_what_the_rank_lost() -> None:
    view = plain_round(1, [6, 6, 6])
    one = merge("flexlora", view, settings={"error_feedback": True, "memory_rank": 20})
    assert one.residual > 0.1
    whole = dense(one.adapter.layers["m"], 1.0) + dense(one.memory.residue.layers["m"], 1.0)
    sums, _ = oracle("flexlora", view, {})
    np.testing.assert_allclose(whole, sums["m"], atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "missing"),
    [("loss-reduction", "train_loss_before"), ("discrepancy", "tokens_0")],
)
def test_a_device_that_did_not_tell_leaves_shares_by_examples(weights: str, missing: str) -> None:
    view = plain_round(2, [6, 2])
    merged = merge("anchored", view, settings={"weights": weights})
    assert merged.weights == merge("anchored", view).weights
    why = f"device d0 did not send the metric {missing}; shares go by examples"
    assert merged.warnings == (why,)


@pytest.mark.parametrize(
    ("weights", "metrics"),
    [
        ("loss-reduction", {"train_loss_before": 1e308, "train_loss_after": -1e308}),
        ("loss-reduction", {"train_loss_before": 1e300, "train_loss_after": 0.0}),
        ("discrepancy", {f"tokens_{i}": 1e308 for i in range(16)}),
        ("discrepancy", {f"tokens_{i}": -1.0 if i else 2.0 for i in range(16)}),
        ("discrepancy", {f"tokens_{i}": 0.0 for i in range(16)}),
    ],
)
def test_a_device_that_tells_what_cannot_be_leaves_shares_by_examples(
    weights: str, metrics: dict[str, float]
) -> None:
    view = plain_round(2, [6, 2])
    good = {"train_loss_before": 2.0, "train_loss_after": 1.0}
    good |= {f"tokens_{i}": 1.0 for i in range(16)}
    told = [good | metrics, good]
    view = replace(
        view, updates=[replace(u, metrics=m) for u, m in zip(view.updates, told, strict=True)]
    )
    merged = merge("anchored", view, settings={"weights": weights})
    assert merged.weights == merge("anchored", view).weights
    (why,) = merged.warnings
    assert why.startswith("device d0")
    assert why.endswith("; shares go by examples")


@pytest.mark.parametrize(
    ("rule", "given_", "said"),
    [
        ("anchored", {"momentun": 0.5}, "no setting 'momentun'; did you mean 'momentum'?"),
        ("anchored", {"x": 1}, "no setting 'x'; there are split, weights"),
        ("anchored", {"byzantine": 1}, "no setting 'byzantine'"),
        ("krum", {"byzantin": 1}, "did you mean 'byzantine'?"),
        (
            "krum",
            {"byzantine": 0.5},
            "byzantine: must be a whole number of devices, at most 1000000",
        ),
        ("krum", {"byzantine": True}, "byzantine: must be"),
        ("krum", {"byzantine": -1}, "byzantine: must be"),
        ("geomed", {"iterations": 0}, "iterations: must be at least 1, not 0"),
        ("geomed", {"smoothing": 0.0}, "smoothing: must be more than 0"),
        ("flexlora", {"cap": 1.5}, "cap: must be at most 1.0, not 1.5"),
        (
            "flexlora",
            {"clip": "mean"},
            "must be a number over 0 and below 1e30 or 'median', not 'm",
        ),
        ("flexlora", {"clip": float("inf")}, "clip: must be"),
        ("flexlora", {"clip": float("nan")}, "clip: must be"),
        ("flexlora", {"clip": -1}, "clip: must be"),
        ("flexlora", {"momentum": 1.0}, "momentum: must be less than 1.0, not 1.0"),
        ("flexlora", {"memory_rank": 0}, "memory_rank: must be at least 1"),
        ("flexlora", {"weights": "size"}, "weights: must be 'samples', 'equal'"),
        ("anchored", {"byzantine": 1}, "no setting 'byzantine'; only krum has it"),
        ("krum", {"smoothing": 0.1}, "no setting 'smoothing'; only geomed has it"),
        ("krum", {"candidates": 3}, "no setting 'candidates'; only trust-validation has it"),
        (
            "anchored",
            {"discrepancy_offset": 1e308},
            "discrepancy_offset: must be at most 1000000.0",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_named(rule: str, given_: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRuleSettings, match=re.escape(said)):
        merge(rule, plain_round(0, [6]), settings=given_)
