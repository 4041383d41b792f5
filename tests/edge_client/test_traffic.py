"""What a round may transfer decides rank and bands: by the link's speed, and the owner's rule."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from typer.testing import CliRunner

from device_profiles.schema import DeviceProfile, Link, load_profile
from edge_client.cli import app
from edge_client.config import Settings
from edge_client.errors import NoPlanFits
from edge_client.explain import why
from edge_client.plan import Plan, choose_plan
from edge_client.planned_job import planned_job
from edge_client.policy.owner import Policy
from edge_client.prepare import Planning
from edge_client.traffic import Traffic, traffic_of
from edge_client.wanted import Wanted
from protocol.adapter import parameter_count
from protocol.transport import BrokerAddress
from tests.edge_client.test_plan import CALIBRATION, LADDER, SHAPES, TRAINING

BYTES = {rank: 2 * parameter_count(SHAPES, rank) for rank in LADDER}
"""Of an adapter in bf16."""
MIB = 1 << 20
ANY = Traffic(SHAPES, SHAPES, 2, 2)
LARGE_MIB = 1e5


def plan_with(traffic: Traffic | None) -> Plan:
    wanted = Wanted(SHAPES, LADDER, 64, TRAINING, traffic=traffic)
    return choose_plan(wanted, CALIBRATION, budget_mib=LARGE_MIB, threads=1)


def settings(tmp_path: Path, profile: DeviceProfile, policy: Policy | None = None) -> Settings:
    return Settings(
        name="a",
        broker=BrokerAddress("localhost", 1883),
        data=(),
        state=tmp_path,
        cache=tmp_path,
        profile=profile,
        policy=policy or Policy(),
    )


def test_a_link_of_unknown_speed_limits_nothing() -> None:
    assert plan_with(ANY) == plan_with(None)
    assert (plan_with(ANY).rank, plan_with(ANY).held) == (64, 64)


@pytest.mark.parametrize("rank", LADDER)
def test_the_link_up_limits_the_rank_and_the_link_down_what_is_held(rank: int) -> None:
    slow_up = plan_with(replace(ANY, link_up=BYTES[rank]))
    assert (slow_up.rank, slow_up.held) == (rank, 64)
    slow_down = plan_with(replace(ANY, link_down=BYTES[rank]))
    assert (slow_down.rank, slow_down.held) == (rank, rank)


def test_the_slowest_link_still_takes_part_with_the_smallest_rank() -> None:
    plan = plan_with(replace(ANY, link_down=1.0, link_up=1.0))
    assert (plan.rank, plan.held) == (LADDER[0], LADDER[0])


@pytest.mark.parametrize("rank", LADDER)
@pytest.mark.parametrize("spare", [0.0, 0.9])
def test_no_round_transfers_more_than_the_owner_allows(rank: int, spare: float) -> None:
    limit = (2 + spare) * BYTES[rank] / MIB
    traffic = replace(ANY, mib_a_round=limit)
    plan = plan_with(traffic)
    assert BYTES[plan.rank] + BYTES[plan.held] <= limit * MIB
    assert plan.rank >= rank or plan.held == 64  # to hold all of it comes before rank
    assert traffic.left_to_download(plan.rank) >= BYTES[plan.held]


def test_an_owner_who_allows_less_than_the_smallest_rank_is_told() -> None:
    with pytest.raises(NoPlanFits, match=r"mib_a_round = 0\.001 is too little: .* rank 2"):
        plan_with(replace(ANY, mib_a_round=0.001))


@pytest.mark.parametrize(
    ("traffic", "said"),
    [
        (replace(ANY, link_up=BYTES[8], link_s=60.0), "rank 8 is the largest that the link sends"),
        (replace(ANY, link_down=BYTES[8], link_s=60.0), "all that the link brings in 60 s"),
        (replace(ANY, mib_a_round=2 * BYTES[8] / MIB), "that the policy's mib_a_round = "),
    ],
)
def test_a_plan_says_what_limits_it(traffic: Traffic, said: str) -> None:
    wanted = Wanted(SHAPES, LADDER, 64, TRAINING, traffic=traffic)
    planning = Planning(wanted, CALIBRATION, LARGE_MIB, 1)
    plan = planning.best()
    assert said in why(plan, planning, planning.every(plan.seq_len))


def test_the_traffic_of_a_job_is_that_of_its_encodings_link_and_policy(tmp_path: Path) -> None:
    job, _ = planned_job(None, "", {})
    profile = load_profile("laptop-16gb")
    slow = profile.model_copy(update={"link": Link(kind="cellular", down_mbit=0.8, up_mbit=0.08)})
    found = traffic_of(settings(tmp_path, slow, Policy(mib_a_round=3)), job)
    assert (found.link_down, found.link_up) == (6e6, 6e5)
    assert found.up(4) == found.down(4) == 2 * parameter_count(job.base.modules, 4)
    unknown = profile.model_copy(update={"link": None})
    found = traffic_of(settings(tmp_path, unknown), job.model_copy(update={"encoding_up": "int8"}))
    assert (found.link_down, found.link_up, found.left_to_download(4)) == (inf, inf, inf)
    assert 2 * found.up(4) == found.down(4)
    some = traffic_of(settings(tmp_path, unknown), job, blocks=1)
    assert some.up(4) < some.down(4)


def test_plan_goes_by_the_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("mib_a_round = 1.5\n")
    runner = CliRunner()
    asked = ["plan", "--policy", str(policy), "--max-tokens", "32", "--threads", "1"]
    shown = runner.invoke(app, [*asked, "--json"], catch_exceptions=False)
    found = json.loads(shown.stdout)
    assert "mib_a_round = 1.5 allows" in found["why"]
    assert found["plan"]["rank"] < 64
    policy.write_text("mib_a_round = 0.01\n")
    with pytest.raises(NoPlanFits, match="is too little"):
        runner.invoke(app, asked, catch_exceptions=False)
