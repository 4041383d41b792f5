"""A round of personal adapters: who gets a mixture, of what, and what is tried beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aggregator.errors import BadRuleSettings
from aggregator.merge import Memory, RoundView, Update
from aggregator.merge.lowrank import inner
from aggregator.personal import (
    Answer,
    PersonalRound,
    TrustSettings,
    TrustState,
    personal_round,
    read_trust_settings,
)
from aggregator.personal.candidates import draw
from aggregator.personal.scores import round_scores
from aggregator.personal.temperature import FURTHEST, Temperature
from protocol.adapter import Adapter, Factors
from protocol.probe import TopLogits
from tests.aggregator.merge.made_rounds import best, dense
from tests.aggregator.merge.made_rounds import draw as draw_factors

SHAPES = {"one": (9, 8), "two": (4, 12)}
RANK = 4
AUTO = TrustSettings()


def full_round(devices: int = 4, seed: int = 0) -> RoundView:
    """Return a round of full adapters, all unlike each other."""
    rng = np.random.default_rng(seed)

    def adapter() -> Adapter:
        return Adapter({n: draw_factors(rng, s, RANK) for n, s in SHAPES.items()}, 1.0)

    every = {name: np.arange(RANK) for name in SHAPES}
    updates = [Update(f"d{k}", adapter(), every, 10 + k, {}) for k in range(devices)]
    return RoundView(adapter(), updates, SHAPES, RANK, 7)


def by_validation(view: RoundView, answers: dict[str, Answer], state: TrustState) -> PersonalRound:
    return personal_round("trust-validation", view, answers, {}, state, AUTO, version=3)


def distance(one: Adapter, other: Adapter) -> float:
    squares = 0.0
    for name in SHAPES:
        x, y = one.layers[name], other.layers[name]
        both = Factors(np.concatenate([x.a, y.a]), np.concatenate([x.b, -y.b], axis=1))
        squares += inner(both, both)
    return float(np.sqrt(max(squares, 0.0)))


def test_who_has_not_answered_gets_the_common_adapter() -> None:
    view = full_round()
    first = by_validation(view, {}, TrustState())
    assert first.mixtures == {} and first.trials == {} and first.temperatures == {}
    assert set(first.candidates) == {"d0", "d1", "d2", "d3"}
    np.testing.assert_allclose(first.rows.sum(axis=1), 1)
    answers = {"d1": Answer(received=2.0, own=1.9, candidates={"d0": 1.5, "d3": 2.5})}
    second = by_validation(view, answers, first.state)
    assert set(second.mixtures) == set(second.trials) == {"d1"}
    own = second.rows[1]
    assert own[0] > own[1] > own[3] and own[2] == 0  # nobody has tried d2's
    np.testing.assert_allclose(own[0] / own[1], np.e)  # 0.4 nats at a temperature of 0.4
    shares = np.array([second.common.weights[d] for d in second.devices])
    np.testing.assert_allclose(second.rows[[0, 2, 3]], [shares] * 3)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_what_the_common_adapter_moved_goes_on_in_all_but_candidates(beta: float) -> None:
    view = full_round()
    rng = np.random.default_rng(1)
    moved = Adapter({n: draw_factors(rng, s, 2) for n, s in SHAPES.items()}, 0.5)
    view = replace(view, memory=Memory(moved))
    answers = {"d1": Answer(received=2.0, own=1.9, candidates={"d0": 1.5, "d3": 2.5})}
    settings = TrustSettings(momentum=beta)
    state = TrustState()
    made = personal_round("trust-validation", view, answers, {}, state, settings, version=3)
    full = [u.adapter for u in view.updates]
    shares = np.array([made.common.weights[d] for d in made.devices])
    pairs = [(made.common.adapter, shares, beta), (made.mixtures["d1"], made.rows[1], beta)]
    pairs += [(a, np.eye(4)[int(d[1])], 0.0) for d, a in made.candidates.items()]
    for adapter, weights, pushed in pairs:
        for name in SHAPES:
            total = pushed * dense(moved.layers[name], 0.5)
            total += sum(w * dense(a.layers[name], 1.0) for w, a in zip(weights, full, strict=True))
            ours = dense(adapter.layers[name], adapter.scale)
            np.testing.assert_allclose(ours, best(total, RANK), atol=1e-4)
    assert (made.common.memory.momentum is not None) == (beta > 0)


def test_losses_are_remembered_as_differences_of_one_round() -> None:
    view = full_round()
    once = {"d0": Answer(received=3.0, candidates={"d1": 2.0, "d2": 4.0})}
    later = {"d0": Answer(received=1.0, own=1.1, candidates={"d3": 0.5})}
    state = by_validation(view, once, TrustState()).state
    after = by_validation(view, later, state).state
    assert after.losses["d0"] == pytest.approx({"d1": -1.0, "d2": 1.0, "d0": 0.1, "d3": -0.5})
    assert TrustState.model_validate_json(after.model_dump_json()) == after


def test_scores_are_minus_the_losses_that_are_known() -> None:
    losses = {"d0": {"d0": 0.5, "d2": -1.5}, "d1": {"d0": 2.0, "d3": 0.25}}
    scores = round_scores("trust-validation", full_round(4), TrustState(losses=losses), {})
    no = -np.inf
    wanted = [[-0.5, no, 1.5, no], [-2, -0.25, no, -0.25], [no] * 4, [no] * 4]
    np.testing.assert_array_equal(scores, wanted)  # d1 thinks of itself as of the best


def test_a_mixture_is_the_weighted_sum_and_a_candidate_the_adapter_itself() -> None:
    view = full_round()
    answers = {"d2": Answer(received=2.0, candidates={"d0": 1.0})}
    found = personal_round(
        "trust-validation",
        view,
        answers,
        {},
        TrustState(),
        TrustSettings(temperature=1e-3),
        version=2,
    )
    # d2 alone has answered, and trusts itself as far as d0: half of each.
    np.testing.assert_allclose(found.rows[2], [0.5, 0, 0.5, 0])
    assert found.trials == {}  # a temperature that is given is not tried
    for name, shape in SHAPES.items():
        total = sum(
            0.5 * u.adapter.layers[name].b.astype(np.float64) @ u.adapter.layers[name].a
            for u in (view.updates[0], view.updates[2])
        )
        u, s, vt = np.linalg.svd(total, full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        merged = found.mixtures["d2"].layers[name]
        assert merged.b.shape == (shape[0], RANK)
        np.testing.assert_allclose(merged.b @ merged.a, best, atol=1e-4)
    for update in view.updates:
        assert distance(found.candidates[update.device], update.adapter) < 1e-4


def test_likeness_trusts_those_who_point_the_same_way() -> None:
    view = full_round()
    twin = replace(view.updates[0], device="twin")
    view = replace(view, updates=[*view.updates, twin])
    found = personal_round("trust-weights", view, {}, {}, TrustState(), AUTO, version=2)
    assert set(found.mixtures) == set(found.devices) and found.candidates == {}
    np.testing.assert_allclose(found.rows[0, 0], found.rows[0, 4])
    assert found.rows[0, [1, 2, 3]].max() < found.rows[0, 0] / 2


def test_predictions_are_compared_among_those_who_sent_them() -> None:
    rng = np.random.default_rng(1)
    view = full_round()

    def probe(positions: int = 5) -> TopLogits:
        indices = np.stack([rng.choice(50, 8, replace=False) for _ in range(positions)])
        return TopLogits(indices.astype(np.uint16), rng.random((positions, 8)).astype(np.float16))

    alike = probe()
    probes = {"d0": alike, "d1": alike, "d2": probe(), "d3": probe(3)}
    found = personal_round("trust-predictions", view, {}, probes, TrustState(), AUTO, version=2)
    assert set(found.mixtures) == {"d0", "d1", "d2"}  # d3 predicted another text
    np.testing.assert_allclose(found.rows[0, 0], found.rows[0, 1])
    assert found.rows[0, 2] < found.rows[0, 1] and found.rows[0, 3] == 0


def test_a_temperature_moves_to_where_the_trust_split_does_better() -> None:
    start = Temperature()
    assert start.trial.value("trust-validation") == 0.8
    assert start.after(2.0, 1.9) == Temperature(1, -1)
    assert start.after(2.0, 2.1) == Temperature(0, -1)
    assert start.after(2.0, 2.1).after(2.0, 1.9) == Temperature(-1, 1)
    assert Temperature(FURTHEST, 1).after(2.0, 1.9) == Temperature(FURTHEST, -1)
    answers = {"d0": Answer(received=2.0, trial=1.0, candidates={"d1": 1.0})}
    found = by_validation(full_round(), answers, TrustState())
    assert found.temperatures == {"d0": 0.8}


def test_the_sharper_of_two_temperatures_has_to_win_clearly() -> None:
    flatter, sharper = Temperature(0, 1), Temperature(0, -1)
    assert flatter.after(2.0, 2.01) == Temperature(1, -1)  # half a percent worse, and flatter
    assert sharper.after(2.0, 1.99) == Temperature(0, 1)  # half a percent better is not enough
    assert sharper.after(2.0, 1.9) == Temperature(-1, 1)


def test_after_the_last_round_a_sharper_mixture_is_there_to_keep() -> None:
    view = full_round()
    answers = {"d1": Answer(received=2.0, own=1.9, candidates={"d0": 1.5, "d3": 2.5})}
    last = personal_round(
        "trust-validation", view, answers, {}, TrustState(), AUTO, version=3, last=True
    )
    assert last.candidates == {}
    fixed = TrustSettings(temperature=0.2)
    sharper = personal_round("trust-validation", view, answers, {}, TrustState(), fixed, version=3)
    assert distance(last.trials["d1"], sharper.mixtures["d1"]) < 1e-4


def test_however_flat_devices_trained_the_last_mixture_is_sharper_than_the_start() -> None:
    assert Temperature(5).last.value("trust-validation") == 0.2
    assert Temperature(-1).last.value("trust-validation") == 0.1


def test_candidates_are_those_offered_longest_ago() -> None:
    devices = [f"d{k}" for k in range(6)]
    seen: dict[str, int] = {}
    for version in (1, 2, 3):
        drawn = draw(devices, 2, offered=seen, version=version, seed=0)
        assert not set(drawn) & set(seen)
        seen |= dict.fromkeys(drawn, version)
    assert draw(devices, 9, offered=seen, version=4, seed=0) == devices


def test_settings_say_what_is_wrong() -> None:
    assert read_trust_settings({"temperature": 0.5}).temperature == 0.5
    for given, why in (
        ({"temperature": 0}, "over 0 and below 1e6 or 'auto'"),
        ({"temperature": True}, "over 0 and below 1e6 or 'auto'"),
        ({"candidates": 65}, "candidates"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ):
        with pytest.raises(BadRuleSettings, match=why):
            read_trust_settings(given)
