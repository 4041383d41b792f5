"""A device that keeps a private adapter, killed while it trains it and while it writes it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import base_tiny
from edge_client.evaluate import evaluate_peft
from tests.faults.processes import SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60
RANK = 2


def test_a_private_adapter_outlives_kills_and_is_mixed_at_the_end(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk = fleet.device("desk")
    first = fleet.device("kitchen", "--private-rank", RANK)
    first.wait_for("private", step=1)
    first.end(signal.SIGKILL)
    assert not first.of("private-trained")

    second = fleet.device("kitchen", "--private-rank", RANK)
    assert second.wait_for("private-trained")["version"] == 1
    second.end(signal.SIGKILL)

    third = fleet.device("kitchen", "--private-rank", RANK, fault="file.written:1")
    assert third.wait() == -signal.SIGKILL
    assert third.of("private")  # beside version 2, and not kept
    assert not third.of("private-trained")

    last = fleet.device("kitchen", "--private-rank", RANK)
    assert [last.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)
    assert [event["version"] for event in last.of("private-trained")] == [2, 3]
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
    assert [losses[0] for losses in through_peft] == pytest.approx(
        [mixed["loss_shared"], mixed["loss_mixed"]], abs=0.02
    )
    assert "private" not in desk.of("finished")[0]
