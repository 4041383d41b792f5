"""Devices that get adapters of their own: three rounds of real training, one killed on its way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.faults.processes import Program, SmallFleet

ROUNDS = 3


def make_personal(fleet: SmallFleet) -> None:
    job = json.loads(fleet.job_file.read_text())
    job |= {"rule": "trust-validation", "rounds": ROUNDS, "rule_settings": {"candidates": 2}}
    fleet.job_file.write_text(json.dumps(job))


def told(program: Program, kind: str, number: int) -> list[str]:
    return [e["adapter"] for e in program.of(kind) if e["round"] == number]


@pytest.mark.timeout(400)  # seconds where nobody else uses the machine: below 60
def test_each_device_ends_with_its_own_adapter_though_one_is_killed_while_it_tries_others(
    fleet: SmallFleet, tmp_path: Path
) -> None:
    make_personal(fleet)
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk, killed = fleet.device("desk"), fleet.device("kitchen")
    killed.wait_for("tried", round=2)
    killed.end(signal.SIGKILL)
    assert not [e for e in killed.of("step") if e["round"] == 2], "it tries before it trains"
    kitchen = fleet.device("kitchen")
    assert [desk.wait(), kitchen.wait(), aggregator.wait()] == [0, 0, 0]
    assert desk.stderr == kitchen.stderr == ""

    merged = [e["round"] for e in aggregator.of("merged")]
    counted = [(e["round"], e["device"]) for e in aggregator.of("counted")]
    assert merged == [1, 2, 3]
    assert sorted(counted) == [(n, name) for n in merged for name in ("desk", "kitchen")]
    candidates = [f"candidate {n} of version 2" for n in range(2)]
    for device in (desk, kitchen):
        assert sorted(told(device, "tried", 2)) == candidates, "anew after the kill"
        assert not device.of("not-tried")
        # Nobody had answered in round 1, so round 2 starts from the common adapter.
        assert told(device, "evaluated", 2) == ["the common adapter of version 2"]
        assert told(device, "evaluated", 3) == ["its own adapter of version 3"]
        assert told(device, "tried", 3)[0] == "the trial of version 3"
        (end,) = device.of("finished")
        assert (end["kept"], end["personal"]) == ("its own adapter of version 4", 4)
        assert {"base", "merged_on_device", "common"} <= end["loss"].keys()
    own = {
        (name, kind): load_file(tmp_path / name / kind / "adapter_model.safetensors")
        for name in ("desk", "kitchen")
        for kind in ("adapter", "common")
    }
    same = [
        all((own["desk", "common"][key] == value).all() for key, value in other.items())
        for other in (own["kitchen", "common"], own["kitchen", "adapter"], own["desk", "adapter"])
    ]
    assert same == [True, False, False]
