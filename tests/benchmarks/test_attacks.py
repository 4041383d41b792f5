"""What the attacker of `benchmarks.attacks` sends, and what is claimed of what came of it."""

from __future__ import annotations

import numpy as np
import pytest

from aggregator.merge import RoundView, Update
from benchmarks.attacks import ARMS, ATTACKS, claims
from protocol.adapter import Adapter, Factors

AT = np.array([1, 3])


def drawn(rng: np.random.Generator, rank: int) -> Adapter:
    a, b = rng.standard_normal((rank, 6)), rng.standard_normal((5, rank))
    return Adapter({"m": Factors(a.astype(np.float32), b.astype(np.float32))}, 2.0)


@pytest.mark.parametrize(("attack", "part"), [("flipped", -1), ("scaled", 100), ("stale", 0)])
def test_an_attacker_sends_part_of_an_honest_change(attack: str, part: int) -> None:
    rng = np.random.default_rng(0)
    first, before, after = drawn(rng, 4), drawn(rng, 4), drawn(rng, 2)
    honest = Update("d0", after, {"m": AT}, 1, {})
    view = RoundView(before, [honest], {"m": (5, 6)}, 4, 0)
    sent = ATTACKS[attack](honest, view, first, rng).layers["m"]
    base = (first if attack == "stale" else before).layers["m"].take(AT)
    moved = after.layers["m"].a - base.a
    np.testing.assert_allclose(sent.a, base.a + part * moved, rtol=1e-4, atol=1e-4)
    assert sent.b.shape == (5, 2)


def test_a_rule_is_judged_by_its_worst_attack() -> None:
    ratios = {
        f"roles, seed {seed}, {arm}": {
            "honest alone": 3.0,
            **dict.fromkeys(ATTACKS, 1.0),
            "scaled": 1.01 + seed / 50,
        }
        for seed in (0, 1)
        for arm in ARMS
    }
    found = {
        claim.claim.rsplit(", roles, ")[1]: claim for claim in claims(ratios, ["roles"], [0, 1])
    }
    assert [claim.value for claim in found.values()] == pytest.approx([1.03] * len(ARMS))
    assert found["fedavg"].met and not found["krum"].met
