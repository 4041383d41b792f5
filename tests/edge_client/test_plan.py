"""Planning is pure: constants and a budget in, sizes that fit it out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

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
    all_plans,
    budget_above_floor,
    choose_plan,
    fits,
    headroom_mib,
    memory_budget,
    micro_batches,
)
from edge_client.prepare import total_budget_mib
from edge_client.wanted import Wanted
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
    tokens_s={
        Way("f32", False): 50.0,
        Way("f32", True): 35.0,
        Way("bf16", False): 100.0,
        Way("bf16", True): 70.0,
    },
)
SLOW_BF16 = replace(
    CALIBRATION,
    tokens_s={
        way: speed / (4 if way.dtype == "bf16" else 1)
        for way, speed in CALIBRATION.tokens_s.items()
    },
)
TRAINING = Training(tokens_per_step=1024, max_tokens=256)
WITH_ADAM = TRAINING.model_copy(update={"optimizer": "adamw"})
budgets = st.floats(660, 4000)
quick = settings(max_examples=40, deadline=None)


def choose(
    budget_mib: float,
    *,
    shared_rank: int = 64,
    memory_scale: float = 1.0,
    calibration: Calibration = CALIBRATION,
    below_mib: float = math.inf,
    training: Training = TRAINING,
) -> Plan:
    return choose_plan(
        Wanted(SHAPES, LADDER, shared_rank, training),
        calibration,
        budget_mib=budget_mib,
        memory_scale=memory_scale,
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
@given(budgets, st.sampled_from([0, 8, 64]), st.sampled_from([CALIBRATION, SLOW_BF16]))
def test_the_prediction_is_within_the_budget_and_is_that_of_the_memory_model(
    budget: float, shared: int, calibration: Calibration
) -> None:
    plan = choose(budget, shared_rank=shared, calibration=calibration)
    fixed = CALIBRATION.activations[Way(plan.dtype, plan.checkpointing)].fixed_mib
    headroom = headroom_mib(plan.predicted_mib, fixed)
    assert plan.needs_mib == pytest.approx(plan.predicted_mib + headroom)
    assert plan.needs_mib <= plan.budget_mib
    assert plan.budget_mib == pytest.approx(budget - FLOOR)
    if not plan.checkpoint_blocks:
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
            optimizer=plan.optimizer,
        )
    assert plan.rank in LADDER
    assert plan.rank <= plan.held <= max(shared, plan.rank)
    assert plan.micro_batch == 1 or plan.micro_batch * plan.seq_len <= TRAINING.tokens_per_step


def test_different_budgets_give_different_ranks() -> None:
    sizes = (673, 678, 688, 710, 740, 820)
    ranks = [choose(size, shared_rank=0, training=WITH_ADAM).rank for size in sizes]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 6
    assert choose(4000).rank == 64


@quick
@given(budgets, st.sampled_from([0, 8, 64]))
def test_adams_moments_are_given_up_for_rank_alone(budget: float, shared: int) -> None:
    plan = choose(budget, shared_rank=shared)
    try:
        adam = choose(budget, shared_rank=shared, training=WITH_ADAM)
    except NoPlanFits:
        assert plan.optimizer == "adafactor"
        return
    assert worth(plan) >= worth(adam)
    assert (plan.optimizer == "adamw") == (worth(plan) == worth(adam))


def test_without_moments_and_gradients_what_is_held_takes_the_memory_not_what_is_trained() -> None:
    def mib(training: Training) -> dict[int, float]:
        every = all_plans(
            Wanted(SHAPES, LADDER, 64, training), CALIBRATION, 256, budget_mib=4000, threads=4
        )
        like = (1, 64, Way("f32", checkpointing=True), 0)
        return {
            p.rank: p.predicted_mib
            for p in every
            if (p.micro_batch, p.held, p.way, p.checkpoint_blocks) == like
        }

    without = mib(TRAINING.model_copy(update={"optimizer": "adafactor"}))
    assert set(without) == set(LADDER)
    assert max(without.values()) == pytest.approx(min(without.values()))
    assert max(without.values()) < min(mib(WITH_ADAM).values())


def test_with_room_for_everything_the_way_that_was_measured_fastest_is_taken() -> None:
    plan = choose(10_000)
    assert (plan.rank, plan.held, plan.seq_len, plan.micro_batch) == (64, 64, 256, 4)
    assert (plan.dtype, plan.checkpointing, plan.threads) == ("bf16", False, 4)
    assert choose(10_000, calibration=SLOW_BF16).dtype == "f32"
    assert plan.predicted_tokens_s == 100


def test_a_dtype_that_is_slow_here_is_taken_for_the_sake_of_rank() -> None:
    plan = choose(800, calibration=SLOW_BF16)
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


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_cap_that_is_named_is_the_least_that_does(scale: float) -> None:
    wanted = Wanted(SHAPES, LADDER, 64, TRAINING)

    def plan(budget_mib: float) -> Plan:
        return choose_plan(
            wanted, CALIBRATION, budget_mib=budget_mib, threads=4, memory_scale=scale
        )

    with pytest.raises(NoPlanFits) as caught:
        plan(5)
    cap = int(str(caught.value).split("--memory-cap ")[1].split()[0])
    assert plan(cap)
    with pytest.raises(NoPlanFits):
        plan(cap - 1)


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
            Wanted(shapes, LADDER, 64, TRAINING),
            calibration,
            budget_mib=budget,
            memory_scale=10,
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
    with pytest.raises(NoPlanFits, match=r"this device has nothing there; .*give --memory-cap"):
        choose(100)


def test_where_memory_is_unknown_the_cap_is_the_budget() -> None:
    known = load_profile("laptop-16gb")
    for unknown in ({"total_mib": None}, {"available_mib": None}):
        profile = known.model_copy(update={"memory": known.memory.model_copy(update=unknown)})
        assert total_budget_mib(profile, 1200) == 1200
        with pytest.raises(ConfigError, match="say how much to use with --memory-cap"):
            total_budget_mib(profile, None)
    assert total_budget_mib(known, 1200) == 1200


def test_a_plan_that_was_too_much_is_followed_by_a_clearly_smaller_one_if_there_is_one() -> None:
    for budget in range(700, 4000, 300):
        plan = choose(budget)
        smaller = choose(budget, below_mib=plan.predicted_mib)
        assert smaller.predicted_mib <= 0.95 * plan.predicted_mib
    smallest = choose(670)
    while True:
        try:
            smallest = choose(670, below_mib=smallest.predicted_mib)
        except NoPlanFits:
            break
    assert smallest.rank == LADDER[0]


def test_no_plan_of_its_rank_that_fits_is_faster() -> None:
    for budget in range(680, 4000, 160):
        plan = choose(budget)
        wanted = Wanted(SHAPES, LADDER, 64, TRAINING)
        every = all_plans(wanted, CALIBRATION, plan.seq_len, budget_mib=budget, threads=4)
        sizes = plan.rank, plan.held, plan.optimizer
        like = [p for p in every if (p.rank, p.held, p.optimizer) == sizes and fits(p)]
        assert plan.predicted_tokens_s == max(p.predicted_tokens_s for p in like)


@given(st.integers(16, 1 << 20), st.integers(16, 1 << 12))
def test_micro_batches_hold_little_more_than_a_step_wants(tokens: int, length: int) -> None:
    found = micro_batches(Training(tokens_per_step=tokens, max_tokens=length), length)
    rows = max(1, tokens // length)
    assert found[0] == 1
    for micro_batch in found:
        trained = -(-rows // micro_batch) * micro_batch
        assert rows <= trained <= 1.125 * rows


def test_a_large_step_offers_micro_batches_near_each_other() -> None:
    found = micro_batches(Training(tokens_per_step=1 << 20, max_tokens=256), 256)
    assert all(b <= 2 * a for a, b in pairwise(found))
    assert all(b <= 1.5 * a for a, b in pairwise(found) if a > 1)


def test_where_nothing_could_be_measured_that_is_why_there_is_no_plan() -> None:
    nothing = replace(CALIBRATION, activations={}, tokens_s={})
    with pytest.raises(NoPlanFits) as caught:
        choose(600, calibration=nothing)
    message = str(caught.value)
    assert "a training step takes more than the 600 MiB" in message
    assert "a floor of 300 MiB and a base of 257 MiB" in message
    assert "\n" not in message


def test_of_a_cgroups_limit_the_agent_takes_its_part() -> None:
    known = load_profile("laptop-16gb")
    memory = known.memory.model_copy(update={"limit_mib": 1000})
    boxed = known.model_copy(update={"memory": memory})
    assert total_budget_mib(boxed, None, own_mib=80) == pytest.approx(920 - 46)
    assert total_budget_mib(known, None, own_mib=80) == total_budget_mib(known, None)


def test_memory_that_is_left_spares_some_blocks_being_made_again() -> None:
    largest = [p for p in every_plan(2000) if (p.dtype, p.rank, p.micro_batch) == ("bf16", 64, 1)]
    least, most = (ends(p.needs_mib for p in largest) for ends in (min, max))
    steps = [least + (most - least) * part / 20 + 0.01 for part in range(21)]
    of_largest = [choose(FLOOR + mib, shared_rank=0, training=WITH_ADAM) for mib in steps]
    assert {plan.rank for plan in of_largest} == {64}
    assert {plan.checkpoint_blocks for plan in of_largest if plan.checkpointing} == {0, 2, 5, 8}
    assert not of_largest[-1].checkpointing
    for less, more in pairwise(of_largest):
        assert more.predicted_tokens_s >= less.predicted_tokens_s


def test_blocks_made_again_in_part_lie_between_none_and_all() -> None:
    plans = every_plan(2000)
    partly = [plan for plan in plans if plan.checkpoint_blocks]
    whole = {
        (p.dtype, p.rank, p.held, p.micro_batch, p.checkpointing): p
        for p in plans
        if not p.checkpoint_blocks
    }
    assert {plan.checkpoint_blocks for plan in partly} == {2, 5, 8}
    for plan in partly:
        sizes = plan.dtype, plan.rank, plan.held, plan.micro_batch
        none, every = whole[(*sizes, False)], whole[(*sizes, True)]
        assert every.predicted_mib < plan.predicted_mib < none.predicted_mib
        assert every.predicted_tokens_s < plan.predicted_tokens_s < none.predicted_tokens_s
        seconds = 0.1 * plan.checkpoint_blocks / every.predicted_tokens_s
        seconds += (1 - 0.1 * plan.checkpoint_blocks) / none.predicted_tokens_s
        assert plan.predicted_tokens_s == pytest.approx(1 / seconds)


def every_plan(budget_mib: float) -> list[Plan]:
    wanted = Wanted(SHAPES, LADDER, 0, WITH_ADAM)
    return all_plans(wanted, CALIBRATION, 256, budget_mib=budget_mib, threads=4)


def test_libraries_that_do_not_fit_are_named_and_no_floor_of_nothing() -> None:
    nothing = replace(CALIBRATION, floor_mib=0.0, activations={}, tokens_s={})
    wanted = Wanted(SHAPES, LADDER, 64, TRAINING)
    with pytest.raises(NoPlanFits, match="the libraries alone take more than the 1 MiB"):
        choose_plan(wanted, nothing, budget_mib=1.0, threads=1)
