"""A real device whose owner says what a round may transfer, beside one that may send anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.adapter import parameter_count
from tests.faults.processes import SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60
MIB = 1 << 20
NUMBER_BYTES = 2
"""In bf16."""
BESIDE = 30_000
"""Bytes of messages that are no tensors: the job, manifests, statuses."""


def policy_of(fleet: SmallFleet, mib: float) -> Path:
    file = fleet.job_file.parent / "policy.toml"
    file.write_text(f"mib_a_round = {mib}\n")
    return file


def test_no_round_of_a_device_transfers_more_than_its_owner_allows(fleet: SmallFleet) -> None:
    job = json.loads(fleet.job_file.read_text())
    shapes = json.loads(Path(job["model"]).read_text())["modules"]
    ladder = job["ladder"]
    limit = NUMBER_BYTES * 2 * parameter_count(shapes, ladder[0]) + 1000
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    kitchen = fleet.device("kitchen", "--policy", policy_of(fleet, limit / MIB))
    desk = fleet.device("desk")
    assert f"rank {ladder[0]} of {ladder[0]} held" in kitchen.wait_for("plan")["plan"]
    assert f"rank {ladder[-1]} of {ladder[-1]} held" in desk.wait_for("plan")["plan"]
    assert [kitchen.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)
    sent = kitchen.of("bytes")[-1]
    versions = job["rounds"] + 1
    assert sent["up"] + sent["down"] < versions * limit + BESIDE
    assert desk.of("bytes")[-1]["up"] > 1.5 * sent["up"]


def test_an_owner_who_allows_too_little_is_told_what_it_takes(fleet: SmallFleet) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    kitchen = fleet.device("kitchen", "--policy", policy_of(fleet, 0.001))
    assert kitchen.wait() != 0
    assert "mib_a_round = 0.001 is too little: a round of rank" in kitchen.stderr
    assert "Traceback" not in kitchen.stderr
    aggregator.wait_for("device", device="kitchen", state="unfit")
