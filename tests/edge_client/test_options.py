"""Options of local training in a whole fleet: base-tiny, two devices, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import base_tiny
from benchmarks.simulation import Setting, SimulatedDevice, Simulation
from edge_client.data import read_examples, split_examples
from edge_client.mixing import WEIGHTS
from protocol.adapter import Adapter, initial_adapter
from protocol.layers import last_blocks
from protocol.messages import Job

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 30
LENGTH = 64


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Simulation:
    """Return two devices of unlike text and rank; a parameter gives the second one's blocks."""
    devices = []
    for name, rank, blocks in (("kitchen", 2, 0), ("desk", 4, getattr(request, "param", 0))):
        pages = [f"{name} page {n}: " + f"what {name} says {n} times. " * 20 for n in range(8)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(pages))
        splits = split_examples(read_examples([tmp_path / f"{name}.txt"]).examples, seed=0)
        devices.append(SimulatedDevice(name, rank, 4, splits, blocks))
    return Simulation(base_tiny.PATH, devices, seed=0, setting=Setting(max_tokens=LENGTH))


def job(fleet: Simulation, **more: Any) -> Job:
    training = {"steps": 3, "tokens_per_step": LENGTH, "max_tokens": LENGTH, "warmup_steps": 0}
    training |= more.pop("training", {})
    return fleet.job(rounds=2, ladder=[2, 4], training=training, encoding_up="f32", **more)


def versions(fleet: Simulation, wanted: Job) -> list[Adapter]:
    """Return the shared adapter as each round leaves it."""
    found: list[Adapter] = []
    fleet.federated(wanted, on_round=lambda _, shared: found.append(shared))
    return found


def row_space(adapter: Adapter, module: str) -> np.ndarray:
    """Return the projector onto the rows of a module's product."""
    f = adapter.layers[module]
    _, values, rows = np.linalg.svd(f.b @ f.a, full_matrices=False)
    rows = rows[: (values > 1e-4 * values[0]).sum()]
    projector: np.ndarray = rows.T @ rows
    return projector


def test_alternating_factors_learn_and_a_round_of_b_stays_in_the_rows_of_a(
    fleet: Simulation,
) -> None:
    wanted = job(fleet, training={"factors": "alternating"}, pruning={"enabled": False})
    start = initial_adapter(wanted.base.modules, wanted.rank, wanted.scale, wanted.seed)
    first, second = versions(fleet, wanted)
    losses = [np.mean(list(fleet.evaluate(v).values())) for v in (None, first, second)]
    assert losses[2] < losses[1] < losses[0]
    moved = 0
    for module, factors in start.layers.items():
        rows = factors.a.T @ factors.a  # orthonormal rows
        for version, inside in ((first, True), (second, False)):
            space = row_space(version, module)
            outside = np.linalg.norm(space - rows @ space) / np.linalg.norm(space)
            if inside:
                assert outside < 1e-3, "round 1 trained B alone, and merging lost nothing"
            else:
                moved += outside > 0.01
    assert moved > len(start.layers) / 2, "round 2 trained A"


@pytest.mark.parametrize("fleet", [2], indirect=True)
def test_a_device_of_two_blocks_helps_there_and_leaves_the_others_to_the_rest(
    fleet: Simulation,
) -> None:
    wanted = job(fleet, layers="fit", pruning={"enabled": False})
    *_, last = versions(fleet, wanted)
    base, merged = fleet.evaluate(None), fleet.evaluate(last)
    assert all(merged[name] < base[name] for name in base)
    mine = last_blocks(wanted.base.modules, 2)
    ranks = {
        name: int(np.linalg.matrix_rank((f.b @ f.a).astype(np.float64), tol=1e-6))
        for name, f in last.layers.items()
    }
    # kitchen trains 2 of 4 directions a round; desk all 4, in its two blocks
    assert {ranks[name] for name in mine} == {4}
    assert all(fleet_rank > 0 for fleet_rank in ranks.values())
    norms = {n: float(np.linalg.norm(f.b @ f.a)) for n, f in last.layers.items()}
    others = [norms[name] for name in norms if name not in mine]
    assert np.mean([norms[name] for name in mine]) > np.mean(others)


def test_a_private_adapter_brings_each_device_nearer_to_its_own_text(fleet: Simulation) -> None:
    wanted = job(fleet)
    shared = fleet.federated(wanted)
    before = fleet.evaluate(shared)
    for device in fleet.devices:
        mixed = fleet.mixed(wanted, device, 2, [shared], steps=6)
        assert mixed.weight in WEIGHTS
        assert mixed.held_out < before[device.name], "repeated text: more training helps"
