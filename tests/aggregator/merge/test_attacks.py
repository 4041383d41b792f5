"""A tenth and a fifth of a fleet sends what it should not: who stays near the honest devices?

The honest devices pull the same way and each its own besides, at ranks 2 to 16 of 16, over
rotating directions. Distances are in parts of the mean change of the honest devices alone. A tenth
of sign-flipped or stale devices moves any mean by little, and no rule can tell them from odd text;
what must not happen is that few devices move a round by more than the many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from aggregator.merge import RoundView, Update, merge
from protocol.adapter import Adapter, Factors, module_directions, select
from tests.aggregator.merge.dense_rounds import flat
from tests.aggregator.merge.made_rounds import Dense, draw

SHAPES = {"wide": (24, 48), "tall": (40, 20)}
RANK, SCALE = 16, 2.0
RANKS = [2, 4, 8, 16]
NEAR = {"geomed": 0.45, "krum": 0.65}
"""What a rule stays within. Krum leaves out honest devices too: where ranks are unlike, those of
the largest rank first, for they move the most (0.45 with nobody dishonest)."""

Attack = Callable[[Update, Adapter, Adapter, np.random.Generator], Adapter]
"""An honest update, the previous global, one of earlier rounds, and chance → what is sent."""


def moved(before: Adapter, after: Adapter, part: float) -> Adapter:
    """Return factors that went `part` of the way from before to after."""
    return Adapter(
        {
            n: Factors(f.a + part * (g.a - f.a), f.b + part * (g.b - f.b))
            for (n, f), g in zip(before.layers.items(), after.layers.values(), strict=True)
        },
        before.scale,
    )


def sign_flipped(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    return moved(select(held, honest.directions), honest.adapter, -1.0)


def scaled(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    return moved(select(held, honest.directions), honest.adapter, 100.0)


def whole_scaled(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    return replace(honest.adapter, scale=100.0 * honest.adapter.scale)


def whole_flipped(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    layers = {n: Factors(f.a, -f.b) for n, f in honest.adapter.layers.items()}
    return Adapter(layers, honest.adapter.scale)


def random(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    layers = {n: draw(rng, SHAPES[n], f.rank) for n, f in honest.adapter.layers.items()}
    return Adapter(layers, SCALE)


def stale(honest: Update, held: Adapter, old: Adapter, rng: np.random.Generator) -> Adapter:
    return select(old, honest.directions)


ATTACKS: list[Attack] = [sign_flipped, scaled, whole_scaled, whole_flipped, random, stale]


def global_adapter(rng: np.random.Generator) -> Adapter:
    """Return an adapter as a product merge leaves it: orthonormal rows, falling columns."""
    layers = {}
    for name, (d_out, d_in) in SHAPES.items():
        rows = np.linalg.qr(rng.standard_normal((d_in, RANK)))[0].T
        columns = np.linalg.qr(rng.standard_normal((d_out, RANK)))[0]
        layers[name] = Factors(
            rows.astype(np.float32), (columns * np.linspace(2, 0.2, RANK)).astype(np.float32)
        )
    return Adapter(layers, SCALE)


def honest_round(devices: int, seed: int) -> tuple[RoundView, Adapter]:
    """Return a round of honest devices, and a global of long ago."""
    rng = np.random.default_rng(seed)
    held, old = global_adapter(rng), global_adapter(rng)
    wanted = {n: 0.1 * rng.standard_normal((RANK, s[1])) for n, s in SHAPES.items()}
    pull = {n: 0.1 * rng.standard_normal((s[0], RANK)) for n, s in SHAPES.items()}
    updates = []
    for k in range(devices):
        rank = RANKS[k % len(RANKS)]
        at = module_directions(
            SHAPES,
            "rotating",
            job="j",
            device=f"d{k}",
            round_number=1,
            rank_trained=rank,
            held=RANK,
        )
        layers = {}
        for n, f in select(held, at).layers.items():
            own = 0.03 * rng.standard_normal(f.a.shape), 0.03 * rng.standard_normal(f.b.shape)
            layers[n] = Factors(
                (f.a + wanted[n][at[n]] + own[0]).astype(np.float32),
                (f.b + pull[n][:, at[n]] + own[1]).astype(np.float32),
            )
        updates.append(Update(f"d{k:02}", Adapter(layers, SCALE), at, 100, {}))
    return RoundView(held, updates, SHAPES, RANK, 0), old


def with_attackers(view: RoundView, old: Adapter, attack: Attack, part: float) -> RoundView:
    """Let the last of the devices send something else."""
    rng = np.random.default_rng(1)
    bad = round(part * len(view.updates))
    good = view.updates[:-bad]
    sent = [replace(u, adapter=attack(u, view.previous, old, rng)) for u in view.updates[-bad:]]
    return replace(view, updates=[*good, *sent])


def step(rule: str, view: RoundView, **settings: object) -> Dense:
    """Return by what a round moves the product of all modules."""
    merged = merge(rule, view, settings=settings).adapter
    return flat(merged, view) - flat(view.previous, view)


def attacked(attack: Attack, devices: int, part: float, seed: int) -> tuple[RoundView, RoundView]:
    """Return a round under attack, and that of its honest devices alone."""
    view, old = honest_round(devices, seed)
    honest = replace(view, updates=view.updates[: -round(part * devices)])
    return with_attackers(view, old, attack, part), honest


@pytest.mark.parametrize("rule", ["anchored", "geomed", "flexlora"])
def test_who_points_against_the_others_is_left_out(rule: str) -> None:
    view, honest = attacked(sign_flipped, 10, 0.1, 0)
    plain = {"weights": "equal"} if rule != "geomed" else {}
    left = merge(rule, view, settings={**plain, "opposed": 0.2})
    assert left.weights["d09"] == 0 and sum(w > 0 for w in left.weights.values()) == 9
    kept = merge(rule, honest, settings=plain)
    np.testing.assert_allclose(
        flat(left.adapter, view), flat(kept.adapter, view), rtol=1e-4, atol=1e-5
    )
    again = merge(rule, replace(view, updates=view.updates[::-1]), settings={"opposed": 0.2})
    assert again.weights["d09"] == 0


def test_nobody_is_left_out_where_all_agree_or_nobody_may_be() -> None:
    view, honest = attacked(sign_flipped, 10, 0.1, 0)
    assert merge("anchored", honest, settings={"opposed": 0.4}).weights == pytest.approx(
        merge("anchored", honest).weights
    )
    assert merge("anchored", view, settings={"opposed": 0.05}).weights["d09"] > 0


def distance(rule: str, to: str, rounds: tuple[RoundView, RoundView], **settings: object) -> float:
    """Return how far a rule under attack is from another of the honest alone."""
    view, honest = rounds
    wanted = step("anchored", honest)
    far = step(rule, view, **settings) - step(to, honest)
    return float(np.linalg.norm(far) / np.linalg.norm(wanted))


fleets = pytest.mark.parametrize(("devices", "part"), [(10, 0.1), (10, 0.2), (20, 0.1), (20, 0.2)])


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", NEAR)
@fleets
def test_robust_rules_stay_near(rule: str, attack: Attack, devices: int, part: float) -> None:
    for seed in range(3):
        rounds = attacked(attack, devices, part, seed)
        assert distance(rule, "anchored", rounds) <= NEAR[rule]


@pytest.mark.parametrize("attack", [scaled, whole_scaled, random])
@fleets
def test_averages_fail_where_changes_are_large(attack: Attack, devices: int, part: float) -> None:
    for seed in range(3):
        rounds = attacked(attack, devices, part, seed)
        for rule, least in {"fedavg": 0.4, "flexlora": 1.0, "anchored": 1.0}.items():
            assert distance(rule, rule, rounds) > least


@pytest.mark.parametrize("attack", [scaled, whole_scaled, random])
@fleets
def test_krum_leaves_out_whoever_is_far(attack: Attack, devices: int, part: float) -> None:
    for seed in range(3):
        view, honest = attacked(attack, devices, part, seed)
        weights = merge("krum", view, settings={"byzantine": part}).weights
        bad = set(weights) - {u.device for u in honest.updates}
        assert {d for d, w in weights.items() if w == 0} == bad
        assert distance("krum", "anchored", (view, honest), byzantine=part) < 1e-5


@pytest.mark.parametrize("attack", ATTACKS)
@fleets
def test_clipping_bounds_a_mean_by_the_typical_change(
    attack: Attack, devices: int, part: float
) -> None:
    for seed in range(3):
        rounds = attacked(attack, devices, part, seed)
        assert distance("anchored", "anchored", rounds, clip="median") <= 0.6


def test_a_device_that_claims_all_examples_gets_no_more_than_its_cap() -> None:
    view, old = honest_round(10, 0)
    view = with_attackers(view, old, random, 0.1)
    greedy = replace(view.updates[-1], examples=10**9)
    view = replace(view, updates=[*view.updates[:-1], greedy])
    assert merge("anchored", view).weights["d09"] > 0.99
    assert merge("anchored", view, settings={"cap": 0.15}).weights["d09"] == pytest.approx(0.15)
    assert merge("geomed", view).weights["d09"] < 0.1  # it starts from equal shares
