"""A device that keeps a private adapter, killed while it trains it and while it writes it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import base_tiny
from edge_client.evaluate import evaluate_peft
from tests.faults.processes import SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60
RANK, STEPS = 2, 40
"""Two rounds of these are two parts, of 50 and 30 steps."""


@pytest.mark.parametrize("fleet", [STEPS], indirect=True)
def test_a_private_adapter_outlives_kills_and_is_mixed_at_the_end(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk = fleet.device("desk")
    first = fleet.device("kitchen", "--private-rank", RANK)
    for number in (1, 2):
        first.wait_for("step", round=number, step=1)
    first.wait_for("private", step=1)
    first.end(signal.SIGKILL)
    assert not first.of("private-kept")

    second = fleet.device("kitchen", "--private-rank", RANK)
    assert second.wait_for("private-kept")["part"] == 1
    second.end(signal.SIGKILL)

    third = fleet.device("kitchen", "--private-rank", RANK, fault="file.written:1")
    third.wait_for("private", step=80)  # the last of the second part, which is not kept
    assert third.wait() == -signal.SIGKILL
    assert not third.of("private-kept")

    last = fleet.device("kitchen", "--private-rank", RANK)
    last.wait_for("finished")
    assert [last.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)
    assert [event["part"] for event in last.of("private-kept")] == [2]
    assert [event["step"] for event in last.of("private")] == list(range(51, 81))
    sizes = {e["device"]: e["bytes"] for e in aggregator.of("counted")}
    assert sizes["kitchen"] == sizes["desk"], "nothing more is sent"

    (end,) = last.of("finished")
    mixed, loss = end["private"], end["loss"]
    assert mixed["loss_shared"] == pytest.approx(loss["merged_on_device"], abs=1e-6)
    assert end["peak_mib"] == pytest.approx(end["predicted_mib"], rel=0.3)
    folders = [tmp_path / "kitchen" / name for name in ("adapter", "mixed")]
    assert [mixed["mixed"]] == [str(folders[1])]
    through_peft = evaluate_peft(
        str(base_tiny.PATH), folders, [tmp_path / "kitchen.txt"], max_tokens=64, seed=0
    )
    assert [next(iter(losses.values())) for losses in through_peft] == pytest.approx(
        [mixed["loss_shared"], mixed["loss_mixed"]], abs=0.02
    )
    assert "private" not in desk.of("finished")[0]
