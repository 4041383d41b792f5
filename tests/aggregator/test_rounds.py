"""The state machine of rounds, as a table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from aggregator.rounds import Policy, RoundState, next_action
from protocol.cohort import in_cohort

DAY = 1_000.0
WAITING = RoundState(0, "waiting", 0, None)
OPEN = RoundState(2, "open", 2, DAY)
FINISHED = RoundState(3, "finished", 4, None)
POLICY = Policy(min_devices=2, quorum=2, deadline_s=60)


def action(
    state: RoundState,
    *,
    time_s: float = 0.0,
    online: Collection[str] = (),
    delivered: Collection[str] = (),
    refused: Collection[str] = (),
    policy: Policy = POLICY,
    rounds: int = 3,
) -> str | None:
    return next_action(
        state,
        policy,
        job="notes",
        rounds=rounds,
        time_s=time_s,
        online=online,
        delivered=delivered,
        refused=refused,
    )


@pytest.mark.parametrize(
    ("state", "given", "expected"),
    [
        # waiting
        (WAITING, {"online": ""}, None),
        (WAITING, {"online": "a"}, None),
        (WAITING, {"online": "ab"}, "open"),
        (WAITING, {"online": "a", "time_s": 1e12}, None),
        (RoundState(3, "waiting", 4, None), {"online": "ab"}, "finish"),
        (RoundState(3, "waiting", 4, None), {"online": ""}, "finish"),
        (RoundState(2, "waiting", 3, None), {"online": "ab"}, "open"),
        # open, before the deadline
        (OPEN, {"online": "abc"}, None),
        (OPEN, {"online": "abc", "delivered": "ab"}, None),
        (OPEN, {"online": "abc", "delivered": "abc"}, "merge"),
        (OPEN, {"online": "abc", "delivered": "ab", "refused": "c"}, "merge"),
        (OPEN, {"online": "abc", "delivered": "a", "refused": "bc"}, None),
        (OPEN, {"online": "ab", "delivered": "abc"}, "merge"),  # c delivered and left
        (OPEN, {"online": "ab", "delivered": "ac"}, None),  # b may still deliver
        (OPEN, {"online": "", "delivered": "ab"}, "merge"),
        (OPEN, {"online": "", "delivered": "a"}, None),
        (OPEN, {"online": ""}, None),
        # open, at the deadline and after it
        (OPEN, {"online": "abc", "delivered": "ab", "time_s": DAY - 1e-3}, None),
        (OPEN, {"online": "abc", "delivered": "ab", "time_s": DAY}, "merge"),
        (OPEN, {"online": "abc", "delivered": "a", "time_s": DAY}, "extend"),
        (OPEN, {"online": "", "delivered": "", "time_s": DAY}, "extend"),
        (OPEN, {"online": "abc", "delivered": "a", "refused": "bc", "time_s": DAY}, "extend"),
        # finished
        (FINISHED, {"online": "abc", "delivered": "abc", "time_s": 1e12}, None),
    ],
)
def test_table(state: RoundState, given: dict[str, Any], expected: str | None) -> None:
    assert action(state, **given) == expected


def test_a_round_without_a_deadline_waits_on() -> None:
    state = RoundState(1, "open", 1, None)
    assert action(state, online="abc", delivered="ab", time_s=1e12) is None
    assert action(state, online="abc", delivered="abc") == "merge"


def test_only_the_cohort_of_the_round_is_waited_for() -> None:
    policy = Policy(min_devices=1, quorum=1, fraction=0.5)
    fleet = [f"device-{i}" for i in range(40)]
    asked = {d for d in fleet if in_cohort(d, "notes", OPEN.number, 0.5)}
    assert 5 < len(asked) < 35
    assert action(OPEN, policy=policy, online=fleet, delivered=asked) == "merge"
    assert action(OPEN, policy=policy, online=fleet, delivered=asked - {min(asked)}) is None


def test_the_cohort_is_drawn_anew_each_round() -> None:
    fleet = [f"device-{i}" for i in range(40)]
    draws = {
        frozenset(d for d in fleet if in_cohort(d, "notes", number, 0.5)) for number in range(5)
    }
    assert len(draws) == 5
    assert all(in_cohort(d, "notes", 1, 1.0) for d in fleet)
    assert not any(in_cohort(d, "notes", 1, 0.0) for d in fleet)


def test_nothing_is_merged_without_a_quorum_even_when_everybody_was_refused() -> None:
    assert action(OPEN, online="ab", refused="ab") is None
    assert action(OPEN, online="ab", refused="ab", time_s=DAY) == "extend"


# -- attempts ----------------------------------------------------------------------------------

FLEET = [f"device-{i}" for i in range(40)]
TENTH = Policy(quorum=3, fraction=0.1)


def asked(attempt: int) -> set[str]:
    share = TENTH.share(attempt)
    return {d for d in FLEET if in_cohort(d, "notes", OPEN.number, share)}


def test_each_attempt_asks_more_and_leaves_nobody_out() -> None:
    assert [round(TENTH.share(n), 3) for n in (0, 1, 5, 9, 10, 99)] == [0.1, 0.2, 0.6, 1, 1, 1]
    for attempt in range(9):
        assert asked(attempt) <= asked(attempt + 1)
    assert asked(0) < asked(9) == set(FLEET)


def test_a_cohort_that_gave_too_little_is_widened_at_once() -> None:
    cohort = asked(0)
    one = {min(cohort)}
    assert action(OPEN, policy=TENTH, online=FLEET, refused=cohort) == "extend"
    assert action(OPEN, policy=TENTH, online=FLEET, delivered=one, refused=cohort - one) == "extend"
    assert action(OPEN, policy=TENTH, online=FLEET, delivered=one) is None, "others may deliver"
    assert action(OPEN, policy=TENTH, online=cohort, refused=cohort) is None, "nobody else is there"
    idle = set(FLEET) - cohort
    assert action(OPEN, policy=TENTH, online=idle) == "extend", "nobody of the cohort is there"
    assert action(OPEN, policy=TENTH, online=()) is None


def test_who_was_refused_before_is_waited_for_in_the_next_attempt() -> None:
    again = replace(OPEN, attempt=1)
    assert action(again, online="abc", delivered="ab", refused="") is None
    assert action(again, online="abc", delivered="ab", refused="c") == "merge"
