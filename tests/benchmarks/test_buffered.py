"""What the benchmark of buffered rounds makes of runs."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.buffered import SYNCHRONOUS, Found, make_claims, shares

PLAIN = Found("unequal", 0, SYNCHRONOUS, [(0.0, 2.9), (200.0, 2.6)], 200.0, 12, 0, {"a": 2.6})
QUICK = replace(PLAIN, arm="buffer 2", reached_s=50.0)
OTHER_SEED = [replace(PLAIN, seed=1, reached_s=100.0), replace(QUICK, seed=1, reached_s=75.0)]


def test_times_are_shares_of_those_of_the_same_seed() -> None:
    found = [PLAIN, QUICK, *OTHER_SEED]
    assert shares(found, "unequal", "buffer 2") == [0.25, 0.75]
    (claim,) = make_claims(found)
    assert claim.value == 0.5 and claim.met


def test_a_target_that_a_seed_did_not_reach_is_said_and_not_met() -> None:
    found = [PLAIN, QUICK, OTHER_SEED[0], replace(OTHER_SEED[1], reached_s=None)]
    assert shares(found, "unequal", "buffer 2") == [0.25, None]
    (claim,) = make_claims(found)
    assert claim.value == "not reached with 1 of 2 seeds" and not claim.met
