"""A real device that trains its last two blocks alone, one factor a round, beside one of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.layers import block_of
from tests.faults.processes import SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60
NUMBER_BYTES = 2
"""In bf16."""


def test_a_device_of_two_blocks_sends_the_factor_of_the_round_in_these(fleet: SmallFleet) -> None:
    job = json.loads(fleet.job_file.read_text())
    training = {**job["training"], "factors": "alternating"}
    fleet.job_file.write_text(json.dumps({**job, "layers": "fit", "training": training}))
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    kitchen, desk = fleet.device("kitchen", "--train-blocks", 2), fleet.device("desk")
    assert "in the last 2 blocks" in kitchen.wait_for("plan")["plan"]
    kitchen.wait_for("finished")
    assert [kitchen.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)

    modules = json.loads(Path(job["model"]).read_text())["modules"]
    of_two = {name for name in modules if block_of(name) >= 4}
    for event in aggregator.of("counted"):
        mine = of_two if event["device"] == "kitchen" else set(modules)
        side = 0 if event["round"] == 1 else 1  # B has d_out rows, A has d_in columns
        numbers = sum(event["rank"] * modules[name][side] for name in mine)
        assert NUMBER_BYTES * numbers < event["bytes"] < NUMBER_BYTES * numbers + 2000
    (end,) = kitchen.of("finished")
    assert end["peak_mib"] == pytest.approx(end["predicted_mib"], rel=0.3)
    assert end["predicted_mib"] < desk.of("finished")[0]["predicted_mib"]
    assert end["loss"]["merged_on_device"] < end["loss"]["base"]


def test_who_asks_for_blocks_in_a_job_of_all_is_told_so_in_one_line(fleet: SmallFleet) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    kitchen = fleet.device("kitchen", "--train-blocks", 2)
    assert kitchen.wait() == 1
    assert "--train-blocks 2: job 'small' has every device train all blocks" in kitchen.stderr
    assert "Traceback" not in kitchen.stderr
    aggregator.wait_for("device", device="kitchen", state="unfit")
