"""A private adapter beside the shared one: mixed exactly, kept whatever happens, never sent."""

from __future__ import annotations

import io
import json
import math
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edge_client.errors import StorageError, TrainingDiverged
from edge_client.learning import OnStep
from edge_client.mixing import WEIGHTS, first_private, stacked
from edge_client.private import Private
from edge_client.result import train_alone
from edge_client.trainer.base import TrainReport
from protocol.adapter import Adapter, Factors, initial_adapter
from protocol.events import EventLog
from protocol.messages import BaseModelInfo, Job, Round, Training

MODULES = {"l.0.q": (6, 5), "l.0.k": (2, 5)}
SHARED_RANK, RANK = 4, 3
MOVED = 6 * 3 + 2 * 2
"""Numbers in B: each part adds one to each."""
JOB = Job(
    job="notes",
    base=BaseModelInfo(name="toy", sha256="0" * 64, parameters=1, modules=MODULES),
    scale=2.0,
    ladder=[2, SHARED_RANK],
    rounds=10,
    training=Training(steps=12),
)


def drawn(rank: int, seed: int, scale: float = 2.0) -> Adapter:
    rng = np.random.default_rng(seed)
    start = initial_adapter(MODULES, rank, scale, seed)
    return Adapter(
        {
            n: Factors(f.a, rng.standard_normal(f.b.shape).astype(np.float32))
            for n, f in start.layers.items()
        },
        scale,
    )


@dataclass
class Learning:
    """Move B by one, and prefer a weight of 0.5; remember what was asked."""

    trained: list[int] = field(default_factory=list)
    splits: list[tuple[float, str]] = field(default_factory=list)
    step: float = 1.0
    best: float = 0.5

    def train_private(
        self, private: Adapter, shared: Adapter, *, steps: int, on_step: OnStep
    ) -> tuple[Adapter, TrainReport]:
        self.trained.append(steps)
        on_step(1, 2.0)
        moved = {n: Factors(f.a, f.b + np.float32(self.step)) for n, f in private.layers.items()}
        return Adapter(moved, private.scale), TrainReport(1, 10, 2.0, 0.0)

    def evaluate(
        self, adapter: Adapter | None, split: str = "held_out", *, private: Any, weight: float
    ) -> float:
        self.splits.append((weight, split))
        return 1.0 + abs(weight - self.best)


def made(folder: Path, rank: int = RANK) -> Private:
    return Private(JOB, "desk", rank, folder, EventLog(as_json=True, stream=io.StringIO()))


def at(state: str) -> Round:
    return Round.model_validate({"job": "notes", "number": 2, "state": state, "version": 3})


def numbers(private: Private) -> float:
    return float(sum(f.b.sum() for f in private._adapter.layers.values()))


def test_it_begins_at_zero_with_directions_of_its_own_and_of_each_device() -> None:
    first = first_private(JOB, "desk", RANK)
    assert first.is_zero
    assert {n: f.rank for n, f in first.layers.items()} == {"l.0.q": 3, "l.0.k": 2}
    assert (first.layers["l.0.q"].a != first_private(JOB, "attic", RANK).layers["l.0.q"].a).any()
    np.testing.assert_array_equal(
        first.layers["l.0.q"].a, first_private(JOB, "desk", RANK).layers["l.0.q"].a
    )


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_stack_adds_the_scaled_deltas_exactly(weight: float) -> None:
    shared, private = drawn(SHARED_RANK, 1), drawn(RANK, 2, scale=0.5)
    both = stacked(shared, private, weight)
    assert both.rank == (SHARED_RANK + RANK if weight else SHARED_RANK)
    for name, factors in both.layers.items():
        one, other = shared.layers[name], private.layers[name]
        wanted = 2.0 * one.b @ one.a + weight * 0.5 * other.b @ other.a
        np.testing.assert_allclose(2.0 * factors.b @ factors.a, wanted, atol=1e-5)


def test_it_is_trained_part_by_part_once_the_job_is_finished_and_goes_on_after_a_restart(
    tmp_path: Path,
) -> None:
    private, learning = made(tmp_path), Learning()
    assert not private.is_due(at("waiting"))
    assert not private.is_due(at("open"))
    for part in (1, 2, 3):
        assert private.is_due(at("finished"))
        private.train(learning, drawn(SHARED_RANK, 1))
        again = made(tmp_path)
        assert numbers(again) == numbers(private) == part * MOVED
        private = again
    assert not private.is_due(at("finished"))
    assert learning.trained == [50, 50, 20]
    (kept,) = (tmp_path / "private-kept").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_another_rank_begins_anew_and_leaves_the_other_be(tmp_path: Path) -> None:
    first = made(tmp_path)
    first.train(Learning(), drawn(SHARED_RANK, 1))
    other = made(tmp_path, rank=2)
    assert numbers(other) == 0
    other.train(Learning(), drawn(SHARED_RANK, 1))
    assert numbers(made(tmp_path)) == numbers(first) != 0


def test_what_has_diverged_is_not_taken(tmp_path: Path) -> None:
    private = made(tmp_path)
    private.train(Learning(), drawn(SHARED_RANK, 1))
    before = numbers(private)
    private.train(Learning(step=float("nan")), drawn(SHARED_RANK, 1))
    assert numbers(private) == numbers(made(tmp_path)) == before
    (kept,) = (tmp_path / "private-kept").iterdir()
    assert kept.name == "notes.r3.part2.safetensors"


def test_what_diverges_on_the_way_is_a_part_without_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, learning = made(tmp_path), Learning()

    def diverge(*_: object, **__: object) -> None:
        raise TrainingDiverged("training diverged in step 3")

    monkeypatch.setattr(learning, "train_private", diverge)
    private.train(learning, drawn(SHARED_RANK, 1))
    (kept,) = (tmp_path / "private-kept").iterdir()
    assert kept.name == "notes.r3.part1.safetensors" and numbers(private) == 0


def test_a_training_alone_that_diverges_leaves_the_result(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()

    class Diverges:
        def train_alone(self, **_: object) -> None:
            raise TrainingDiverged("training diverged in step 3")

    said = io.StringIO()
    events = EventLog(as_json=True, stream=said)
    assert math.isnan(train_alone(tmp_path, JOB, cast("Any", Diverges()), 4, events))
    assert "alone-diverged" in said.getvalue() and not (tmp_path / "alone").exists()


def test_a_damaged_file_is_said_in_one_line(tmp_path: Path) -> None:
    made(tmp_path).train(Learning(), drawn(SHARED_RANK, 1))
    (kept,) = (tmp_path / "private-kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"private adapter in .*part1\.safetensors is damaged"):
        made(tmp_path)


def test_the_weight_is_chosen_on_the_trust_split_and_the_losses_are_of_held_out_text(
    tmp_path: Path,
) -> None:
    private, learning, shared = made(tmp_path), Learning(), drawn(SHARED_RANK, 1)
    private.train(learning, shared)
    mixed = private.mix(learning, shared)
    assert (mixed.weight, mixed.loss_shared, mixed.loss_mixed) == (0.5, 1.5, 1.0)
    assert {split for weight, split in learning.splits if weight not in (0.0, 0.5)} == {"trust"}
    ranks = {
        folder.name: json.loads((folder / "adapter_config.json").read_text())["r"]
        for folder in (mixed.private, mixed.mixed)
    }
    assert ranks == {"private": RANK, "mixed": SHARED_RANK + RANK}


@pytest.mark.parametrize("worse", [lambda weight: 1.0 + weight, lambda weight: float("nan")])
def test_what_does_not_help_is_left_out(
    tmp_path: Path, worse: Callable[[float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, learning, shared = made(tmp_path), Learning(), drawn(SHARED_RANK, 1)
    private.train(learning, shared)

    def evaluate(adapter: object, split: str, *, private: object, weight: float) -> float:
        return worse(weight) if weight else 1.0

    monkeypatch.setattr(learning, "evaluate", evaluate)
    mixed = private.mix(learning, shared)
    assert (mixed.weight, mixed.loss_shared, mixed.loss_mixed) == (0.0, 1.0, 1.0)
    config = json.loads((mixed.mixed / "adapter_config.json").read_text())
    assert config["r"] == SHARED_RANK
