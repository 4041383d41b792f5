"""Planning is pure: constants and a budget in, sizes that fit it out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles.schema import load_profile
from edge_client.errors import ConfigError, NoPlanFits
from edge_client.memory import Activations, Way, predict_mib
from edge_client.plan import (
    HEAP_MIB,
    Calibration,
    Plan,
    budget_above_floor,
    choose_plan,
    headroom_mib,
    memory_budget,
)
from edge_client.prepare import total_budget_mib
from protocol.messages import Training

SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(10)
    for name, shape in {
        "self_attn.q_proj": (1728, 1728),
        "self_attn.k_proj": (576, 1728),
        "mlp.down_proj": (1728, 4608),
    }.items()
}
LADDER = (2, 4, 8, 16, 32, 64)
FLOOR = 300.0
CALIBRATION = Calibration(
    floor_mib=FLOOR,
    weights_mib={"f32": 513.0, "bf16": 257.0},
    activations={
        Way("f32", False): Activations(40.0, 1.0),
        Way("f32", True): Activations(40.0, 0.2),
        Way("bf16", False): Activations(50.0, 0.6),
        Way("bf16", True): Activations(50.0, 0.12),
    },
)
TRAINING = Training(tokens_per_step=1024, max_tokens=256)
budgets = st.floats(660, 4000)
quick = settings(max_examples=40, deadline=None)


def choose(
    budget_mib: float,
    *,
    shared_rank: int = 64,
    memory_scale: float = 1.0,
    native_bf16: bool = True,
    below_mib: float = math.inf,
) -> Plan:
    return choose_plan(
        SHAPES,
        CALIBRATION,
        budget_mib=budget_mib,
        memory_scale=memory_scale,
        ladder=LADDER,
        shared_rank=shared_rank,
        training=TRAINING,
        native_bf16=native_bf16,
        threads=4,
        below_mib=below_mib,
    )


def worth(plan: Plan) -> tuple[int, bool, int, int]:
    """Order plans as the documentation does."""
    return plan.seq_len, plan.held >= 64, plan.rank, plan.held


@quick
@given(budgets, budgets)
def test_more_memory_never_gives_a_smaller_rank(one: float, other: float) -> None:
    """With no remainder to hold, at one sequence length."""
    less, more = (choose(b, shared_rank=0) for b in sorted((one, other)))
    assert less.seq_len <= more.seq_len
    if less.seq_len == more.seq_len:
        assert less.rank <= more.rank


@quick
@given(budgets, budgets)
def test_more_memory_never_gives_a_worse_plan_with_a_remainder(one: float, other: float) -> None:
    """Whole sequences come first, then the whole shared adapter, then rank, then the remainder."""
    less, more = (worth(choose(b)) for b in sorted((one, other)))
    assert less <= more


def test_more_memory_can_give_a_smaller_rank_for_the_sake_of_the_whole_adapter() -> None:
    plans = [choose(budget) for budget in range(670, 730, 4)]
    at = next(i for i, plan in enumerate(plans) if plan.held >= 64)
    assert plans[at - 1].rank > plans[at].rank
    assert worth(plans[at - 1]) < worth(plans[at])


@settings(max_examples=10, deadline=None)
@given(st.floats(670, 760), st.sampled_from([0, 64]))
def test_stepping_down_gives_smaller_plans_until_none_is_left(budget: float, shared: int) -> None:
    plan = choose(budget, shared_rank=shared)
    for _ in range(2000):
        try:
            smaller = choose(budget, shared_rank=shared, below_mib=plan.predicted_mib)
        except NoPlanFits as error:
            said = str(error)
            break
        assert smaller.predicted_mib < plan.predicted_mib
        assert worth(smaller) <= worth(plan)
        plan = smaller
    assert f"a plan of {plan.predicted_mib:.0f} MiB above the floor was too much" in said
    assert "\n" not in said


@quick
@given(budgets, st.sampled_from([0, 8, 64]), st.booleans())
def test_the_prediction_is_within_the_budget_and_is_that_of_the_memory_model(
    budget: float, shared: int, native: bool
) -> None:
    plan = choose(budget, shared_rank=shared, native_bf16=native)
    fixed = CALIBRATION.activations[Way(plan.dtype, plan.checkpointing)].fixed_mib
    headroom = headroom_mib(plan.predicted_mib, fixed)
    assert plan.predicted_mib + headroom <= plan.budget_mib
    assert plan.budget_mib == pytest.approx(budget - FLOOR)
    way = Way(plan.dtype, plan.checkpointing)
    assert plan.predicted_mib == predict_mib(
        SHAPES,
        weights_mib=CALIBRATION.weights_mib[plan.dtype],
        activations=CALIBRATION.activations[way],
        way=way,
        rank=plan.rank,
        held=plan.held,
        tokens=plan.micro_batch * plan.seq_len,
        accumulates=plan.micro_batch * plan.seq_len < TRAINING.tokens_per_step,
    )
    assert plan.rank in LADDER
    assert plan.rank <= plan.held <= max(shared, plan.rank)
    assert plan.micro_batch == 1 or plan.micro_batch * plan.seq_len <= TRAINING.tokens_per_step


def test_different_budgets_give_different_ranks() -> None:
    ranks = [choose(budget, shared_rank=0).rank for budget in (673, 678, 688, 710, 740, 820)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 6
    assert choose(4000).rank == 64


def test_with_room_for_everything_the_fast_way_is_taken() -> None:
    plan = choose(10_000)
    assert (plan.rank, plan.held, plan.seq_len, plan.micro_batch) == (64, 64, 256, 4)
    assert (plan.dtype, plan.checkpointing, plan.threads) == ("bf16", False, 4)
    assert choose(10_000, native_bf16=False).dtype == "f32"


def test_a_dtype_that_is_slow_here_is_taken_for_the_sake_of_rank() -> None:
    plan = choose(800, native_bf16=False)
    assert plan.dtype == "bf16"


def test_freed_memory_is_kept_only_where_the_budget_is_well_above_the_prediction() -> None:
    assert choose(10_000).has_room
    plan = choose(700)
    assert not plan.has_room
    assert not replace(plan, predicted_mib=100.0, budget_mib=140.0).has_room
    assert replace(plan, predicted_mib=100.0, budget_mib=141.0).has_room


def test_sequences_are_cut_only_when_nothing_fits_with_whole_ones() -> None:
    lengths = {choose(b, shared_rank=0).seq_len for b in range(650, 1200, 5)}
    assert 256 in lengths
    assert lengths - {256}
    assert lengths <= {64, 128, 256}
    cut = max(b for b in range(650, 1200, 5) if choose(b, shared_rank=0).seq_len < 256)
    whole = choose(cut + 5, shared_rank=0)
    assert whole.seq_len == 256
    assert whole.micro_batch == 1
    assert whole.checkpointing


def test_nothing_fits_says_what_would_and_what_to_do() -> None:
    with pytest.raises(NoPlanFits) as caught:
        choose(450)
    message = str(caught.value)
    smallest = 50 + 1.1 * (257 + 64 * 0.12)
    needs = int(message.split("needs ")[1].split(" MiB")[0])
    assert smallest < needs < smallest + 20
    assert "a floor of 300 MiB" in message
    assert "this device has 150 MiB there" in message
    assert "smaller base model" in message
    assert "\n" not in message


@given(budgets, st.floats(1, 100))
def test_a_scaled_budget_divides_only_what_depends_on_the_model(
    budget: float, scale: float
) -> None:
    assert budget_above_floor(budget, FLOOR, 40.0) == pytest.approx(budget - FLOOR)
    scaled = budget_above_floor(budget, FLOOR, 40.0, scale)
    undivided = 40.0 + HEAP_MIB
    assert (scaled - undivided) * scale == pytest.approx(budget - FLOOR - undivided)


def test_a_small_model_on_a_scaled_budget_gets_the_rank_of_a_large_one() -> None:
    """A model 1/10 in each of its parts, on a budget scaled by 10, is planned as the large one."""
    shapes = {name: SHAPES[name] for name in list(SHAPES)[:3]}
    calibration = replace(
        CALIBRATION,
        weights_mib={dtype: mib / 10 for dtype, mib in CALIBRATION.weights_mib.items()},
        activations={
            way: Activations(a.fixed_mib, a.token_mib / 10)
            for way, a in CALIBRATION.activations.items()
        },
    )
    for budget in range(680, 2400, 40):
        small = choose_plan(
            shapes,
            calibration,
            budget_mib=budget,
            memory_scale=10,
            ladder=LADDER,
            shared_rank=64,
            training=TRAINING,
            native_bf16=True,
            threads=4,
        )
        large = choose(budget)
        assert (small.rank, small.held, small.seq_len) == (large.rank, large.held, large.seq_len)


@pytest.mark.parametrize(
    ("available", "limit", "cap", "expected"),
    [
        (3000, None, None, 3000 - 200),
        (3000, 1000, None, 1000 - 50),
        (3000, 1000, 800, 800),
        (3000, None, 800, 800),
        (3000, None, 50, 50),
        (3000, 1000, 980, 1000 - 50),
        (150, None, None, 0),
        (500, 1000, 800, 500 - 50),
        (3000, 8000, None, 3000 - 200),
    ],
)
def test_memory_budget_table(
    available: float, limit: float | None, cap: float | None, expected: float
) -> None:
    found = memory_budget(total_mib=4000, available_mib=available, limit_mib=limit, cap_mib=cap)
    assert found == pytest.approx(expected)


def test_a_cap_below_the_floor_is_said_without_negative_sizes() -> None:
    with pytest.raises(NoPlanFits, match=r"this device has nothing there; .*raise --memory-cap"):
        choose(100)


def test_where_memory_is_unknown_the_cap_is_the_budget() -> None:
    known = load_profile("laptop-16gb")
    for unknown in ({"total_mib": None}, {"available_mib": None}):
        profile = known.model_copy(update={"memory": known.memory.model_copy(update=unknown)})
        assert total_budget_mib(profile, 1200) == 1200
        with pytest.raises(ConfigError, match="say how much to use with --memory-cap"):
            total_budget_mib(profile, None)
    assert total_budget_mib(known, 1200) == 1200
