"""With one factor frozen for everybody, averages lose nothing: the point of alternating factors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.merge import RoundView, Update, merge
from aggregator.merge.rules import RULES
from protocol.adapter import Adapter, Factors, directions
from protocol.factors import Trained
from tests.aggregator.merge.made_rounds import dense, draw

SHAPE, RANK, SCALE = (9, 8), 4, 2.0
AVERAGES = ("fedavg", "hetlora", "flexlora", "anchored", "segment", "flora")


def round_of(seed: int, trained: Trained, *, mode: str, ranks: tuple[int, ...]) -> RoundView:
    """Devices of these ranks that have moved the trained factors of the same version."""
    rng = np.random.default_rng(seed)
    before = draw(rng, SHAPE, RANK)
    updates = []
    for k, rank in enumerate(ranks):
        at = np.array(
            directions(mode, job="j", device=f"d{k}", round_number=1, rank=rank, held=RANK), np.intp
        )
        mine, moved = before.take(at), draw(rng, SHAPE, rank)
        after = Factors(
            mine.a + (0 if trained == "B" else moved.a), mine.b + (0 if trained == "A" else moved.b)
        )
        updates.append(Update(f"d{k}", Adapter({"m": after}, SCALE), {"m": at}, 1 + 3 * k, {}))
    return RoundView(Adapter({"m": before}, SCALE), updates, {"m": SHAPE}, RANK, 0, trained=trained)


@pytest.mark.parametrize("rule", AVERAGES)
@given(
    seed=st.integers(0, 1000),
    trained=st.sampled_from(["A", "B"]),
    mode=st.sampled_from(["top", "rotating"]),
    ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=4).map(tuple),
)
def test_a_round_of_one_factor_is_the_mean_of_its_products(
    rule: str, seed: int, trained: Trained, mode: str, ranks: tuple[int, ...]
) -> None:
    view = round_of(seed, trained, mode=mode, ranks=ranks)
    merged = merge(rule, view)
    assert merged.residual < 1e-6
    weights = RULES[rule].weighting
    columns = weights.spread(view, "m", weights.share(view))
    expected = dense(
        Factors(view.previous.layers["m"].a, view.previous.layers["m"].b * columns.previous), SCALE
    )
    for update, own in zip(view.updates, columns.devices, strict=True):
        factors = update.adapter.layers["m"]
        expected = expected + dense(Factors(factors.a, factors.b * own), SCALE)
    found = dense(merged.adapter.layers["m"], SCALE)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_a_factor_average_keeps_the_frozen_factor_to_the_bit() -> None:
    for trained in ("A", "B"):
        view = round_of(3, trained, mode="top", ranks=(2, 4))
        before, after = view.previous.layers["m"], merge("hetlora", view).adapter.layers["m"]
        same = (after.a, before.a) if trained == "B" else (after.b, before.b)
        np.testing.assert_array_equal(*same)


def test_with_both_factors_trained_a_factor_average_does_lose() -> None:
    view = round_of(3, "both", mode="top", ranks=(4, 4, 4))
    assert merge("fedavg", view).residual > 0.05


def test_a_foreign_scale_goes_to_the_factor_that_was_trained() -> None:
    view = round_of(5, "A", mode="top", ranks=(4,))
    (update,) = view.updates
    foreign = replace(update, adapter=Adapter(update.adapter.layers, SCALE / 4))
    found = merge("fedavg", replace(view, updates=[foreign])).adapter.layers["m"]
    np.testing.assert_array_equal(found.b, view.previous.layers["m"].b)
    np.testing.assert_allclose(found.a, update.adapter.layers["m"].a / 4, rtol=1e-5)
