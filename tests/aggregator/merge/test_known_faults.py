"""Faults found in public code of these methods ("Known faults", docs/algorithms.md).

Each test would fail if ours had the fault; where it can, it also computes the faulty result and
shows that it is another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from aggregator.errors import MergeError, UnknownRule
from aggregator.merge import RULES, RoundView, Update, merge
from aggregator.merge.rules import find_rule
from aggregator.merge.trust import personal, softmax_rows
from protocol.adapter import Adapter, Factors

Dense = npt.NDArray[np.float64]
PRODUCTS = ["flexlora", "flora"]


def factors(seed: int, d_out: int, d_in: int, rank: int) -> Factors:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, d_in)).astype(np.float32)
    return Factors(a, rng.standard_normal((d_out, rank)).astype(np.float32))


def dense(f: Factors, scale: float) -> Dense:
    return scale * f.b.astype(np.float64) @ f.a.astype(np.float64)


def round_of(layers: list[Factors], rank: int, scales: list[float] | None = None) -> RoundView:
    shape = (layers[0].b.shape[0], layers[0].a.shape[1])
    updates = [
        Update(f"d{k}", Adapter({"m": f}, s), {"m": np.arange(f.rank)}, 1, {})
        for k, (f, s) in enumerate(zip(layers, scales or [1.0] * len(layers), strict=True))
    ]
    return RoundView(Adapter({"m": factors(99, *shape, rank)}, 1.0), updates, {"m": shape}, rank, 0)


def merged_delta(rule: str, view: RoundView) -> Dense:
    adapter = merge(rule, view).adapter
    return dense(adapter.layers["m"], adapter.scale)


@pytest.mark.parametrize("rule", PRODUCTS)
def test_rows_of_v_are_not_taken_for_rows_of_v_transposed(rule: str) -> None:
    layers = [factors(k, 12, 12, 2) for k in range(3)]
    mean = sum(dense(f, 1) for f in layers) / 3
    u, s, vt = np.linalg.svd(mean)
    right, wrong = (u[:, :4] * s[:4]) @ vt[:4], (u[:, :4] * s[:4]) @ vt.T[:4]
    ours = merged_delta(rule, round_of(layers, 4))
    assert np.linalg.norm(right - wrong) > 0.5 * np.linalg.norm(right)
    np.testing.assert_allclose(ours, right, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_counts_once_for_the_product(rule: str) -> None:
    f = factors(0, 9, 8, 3)
    np.testing.assert_allclose(
        merged_delta(rule, round_of([f], 3, [4.0])), dense(f, 4.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rule", PRODUCTS)
def test_alpha_over_rank_is_each_devices_own(rule: str) -> None:
    ranks, alpha = [4, 8, 16, 32], 16.0
    layers = [factors(k, 70, 66, r) for k, r in enumerate(ranks)]
    scales = [alpha / r for r in ranks]
    wanted = sum(dense(f, s) for f, s in zip(layers, scales, strict=True)) / 4
    fixed = sum(dense(f, alpha / 32) for f in layers) / 4  # the server's alpha over its own rank
    ours = merged_delta(rule, round_of(layers, 60, scales))
    assert np.linalg.norm(fixed - wanted) > 0.5 * np.linalg.norm(wanted)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_a_cut_keeps_the_scale_of_its_columns() -> None:
    whole = Adapter({"m": factors(0, 9, 8, 4)}, 2.0)
    part = whole.truncated(2)
    update = Update("d", part, {"m": np.arange(2)}, 1, {})
    result = merge("anchored", RoundView(whole, [update], {"m": (9, 8)}, 4, 0)).adapter
    np.testing.assert_allclose(
        dense(result.layers["m"], result.scale), dense(whole.layers["m"], 2.0), atol=1e-5
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_device_survives_the_sum(rule: str) -> None:
    layers = [factors(k, 12, 11, 2) for k in range(4)]
    whole = merged_delta(rule, round_of(layers, 8))
    for k in range(4):  # a sum that is zeroed again for each device holds the last alone
        other = list(layers)
        other[k] = factors(50 + k, 12, 11, 2)
        changed = merged_delta(rule, round_of(other, 8))
        assert np.linalg.norm(changed - whole) > 0.05 * np.linalg.norm(whole)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_a_dimension_equal_to_the_rank_does_not_swap_a_and_b(
    rule: str, shape: tuple[int, int]
) -> None:
    f = factors(3, *shape, 4)
    result = merge(rule, round_of([f, f], 4)).adapter.layers["m"]
    assert result.a.shape == (4, shape[1])
    assert result.b.shape == (shape[0], 4)
    np.testing.assert_allclose(dense(result, 1), dense(f, 1), atol=1e-5)


@pytest.mark.parametrize("rule", ["fedavg", "hetlora"])
def test_rank_1_does_not_broadcast_over_rank_8(rule: str) -> None:
    wide, thin = factors(0, 9, 9, 8), factors(1, 9, 9, 1)
    view = round_of([wide, thin], 8)
    merged = merge(rule, view)
    p, q = merged.weights["d0"], merged.weights["d1"]
    result = merged.adapter.layers["m"]
    np.testing.assert_allclose(result.a[1:], p * wide.a[1:], atol=1e-6)
    np.testing.assert_allclose(result.b[:, 1:], p * wide.b[:, 1:], atol=1e-6)
    np.testing.assert_allclose(result.a[0], p * wide.a[0] + q * thin.a[0], atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_shapes_are_checked_and_not_names_alone(rule: str) -> None:
    right, wrong = factors(0, 9, 9, 8), factors(1, 9, 9, 8)
    view = round_of([right, Factors(wrong.a[:1], wrong.b)], 8)
    with pytest.raises(MergeError, match="device d1, module m"):
        merge(rule, view)


@pytest.mark.parametrize(
    "name", ["", "fed", "fedavg2", "my-flexlora", "lora", "anchored segment", "FLORA", "flora "]
)
def test_a_rule_is_found_by_its_whole_name(name: str) -> None:
    with pytest.raises(UnknownRule, match=f"^there is no merge rule {name!r}; ") as caught:
        find_rule(name)
    assert {*RULES} <= {*caught.value.known}


def test_each_name_is_a_rule_of_its_own() -> None:
    layers = [factors(0, 20, 20, 6), factors(1, 20, 20, 2), factors(2, 20, 20, 3)]
    view = round_of([layers[0], Factors(layers[1].a, 5 * layers[1].b), layers[2]], 6)
    results = {rule: merged_delta(rule, view) for rule in RULES}
    names = sorted(results)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            far = np.linalg.norm(results[one] - results[other]) > 1e-2
            # the same once compressed; and the same where all devices have as many examples and
            # three are too few to leave one out
            assert far != ({one, other} in ({"flexlora", "flora"}, {"anchored", "krum"}))


def test_scores_without_the_softmax_are_refused() -> None:
    layers = [factors(k, 9, 8, 2) for k in range(3)]
    view = round_of(layers, 4)
    losses = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [3.0, 3.0, 1.0]])
    for raw in (-losses, losses, losses / losses.max()):
        with pytest.raises(MergeError, match="trust"):
            personal(view, raw)
    rows = softmax_rows(-losses)
    assert (rows.argmax(axis=1) == np.arange(3)).all()  # the lowest loss has the most trust
    assert len(personal(view, rows)) == 3
