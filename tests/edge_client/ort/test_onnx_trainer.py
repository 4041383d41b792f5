"""The ONNX Runtime trainer against the torch one: the same losses, adapters and logits."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.data import BatchStream, pack
from edge_client.errors import TrainingPaused
from edge_client.memory import Optimizer
from edge_client.plan import Plan
from edge_client.prune import head_rank, tail_product
from edge_client.trainer.checkpoint import FILE, Checkpoints, Keeping, NotKept, read_kept
from edge_client.trainer.onnx_trainer import OnnxTrainer
from edge_client.trainer.torch_trainer import TorchTrainer
from protocol.adapter import Adapter
from protocol.factors import Trained
from protocol.layers import last_blocks, within
from protocol.messages import Pruning, Training
from tests.edge_client.ort.artifacts import exported, needs_onnx
from tests.edge_client.test_torch_trainer import (
    LENGTH,
    NO_PRUNING,
    Make,
    batches,
    gpt2,
    llama,
    part,
    random_adapter,
    sequences,
    tiny,
)

pytestmark = [needs_onnx, pytest.mark.timeout(300)]
PLAN = Plan(4, 8, 2, LENGTH, False, "f32", 1, 0.0, 0.0, backend="onnx")
optimizers = pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
LOSS, ADAPTER = 1e-4, 1e-3
"""How far 20 steps may take the two trainers apart."""


def both(make: Make) -> tuple[TorchTrainer, OnnxTrainer]:
    model, artifact = exported(make)
    return TorchTrainer(model, dtype="f32", threads=1), OnnxTrainer(artifact, threads=1)


def trained(
    trainer: Any,
    adapter: Adapter,
    frozen: Adapter | None = None,
    *,
    pruning: Pruning = NO_PRUNING,
    factors: Trained = "both",
    steps: int = 20,
    optimizer: Optimizer = "adamw",
) -> tuple[list[float], Adapter]:
    trainer.load(adapter, frozen, replace(PLAN, optimizer=optimizer))
    losses: list[float] = []
    settings = Training(
        steps=steps,
        tokens_per_step=3 * LENGTH,  # two micro-batches of two rows
        max_tokens=LENGTH,
        warmup_steps=3,
        learning_rate_a=0.5,
        weight_decay=0.01,
        clip_norm=0.5,
    )
    trainer.train(
        cycle(batches(sequences(12))),
        settings=settings,
        learning_rate=3e-3,
        pruning=pruning,
        on_step=lambda step, loss: losses.append(loss),
        factors=factors,
    )
    return losses, trainer.adapter()


def apart(one: Adapter, other: Adapter) -> float:
    assert one.layers.keys() == other.layers.keys() and one.scale == other.scale
    return max(
        float(np.abs(f - g).max(initial=0))
        for name, factors in one.layers.items()
        for f, g in zip(
            (factors.a, factors.b), (other.layers[name].a, other.layers[name].b), strict=True
        )
    )


@optimizers
@pytest.mark.parametrize("make", [tiny, llama, gpt2])
def test_twenty_steps_are_those_of_the_torch_trainer(make: Make, optimizer: Optimizer) -> None:
    torch, onnx = both(make)
    whole = random_adapter(torch.shapes, 12)
    assert onnx.shapes == torch.shapes
    ours, theirs = (
        trained(t, part(whole, 0, 8), part(whole, 8, 12), optimizer=optimizer)
        for t in (onnx, torch)
    )
    assert np.abs(np.subtract(ours[0], theirs[0])).max() < LOSS
    assert apart(ours[1], theirs[1]) < ADAPTER
    assert apart(ours[1], part(whole, 0, 8)) > 10 * ADAPTER  # it has moved
    assert ours[0][-1] < ours[0][0]


@optimizers
@pytest.mark.parametrize("make", [tiny, llama, gpt2])
def test_pruning_presses_and_a_cut_adapter_trains_on(make: Make, optimizer: Optimizer) -> None:
    torch, onnx = both(make)
    pruning = Pruning(gamma=0.5, penalty=0.05, rank_min=2)
    start = random_adapter(torch.shapes, 8)
    head = head_rank(8, pruning.gamma, pruning.rank_min)
    ours, theirs = (trained(t, start, pruning=pruning, optimizer=optimizer) for t in (onnx, torch))
    assert apart(ours[1], theirs[1]) < ADAPTER
    assert tail_product(ours[1], head) < tail_product(start, head)
    ours, theirs = (
        trained(t, a[1].truncated(head), optimizer=optimizer, steps=10)  # rounding grows
        for t, a in ((onnx, ours), (torch, theirs))
    )
    assert ours[1].rank == head
    assert np.abs(np.subtract(ours[0], theirs[0])).max() < LOSS
    assert apart(ours[1], theirs[1]) < ADAPTER


@optimizers
@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_alone_is_trained_where_the_job_says_so(
    factors: Trained, optimizer: Optimizer
) -> None:
    torch, onnx = both(llama)
    start = random_adapter(torch.shapes, 4)
    ours, theirs = (
        trained(t, start, factors=factors, steps=5, optimizer=optimizer) for t in (onnx, torch)
    )
    assert apart(ours[1], theirs[1]) < ADAPTER
    for name, found in ours[1].layers.items():
        moved, kept = (found.a, found.b) if factors == "A" else (found.b, found.a)
        before = start.layers[name]
        before_moved, before_kept = (before.a, before.b) if factors == "A" else (before.b, before.a)
        assert not np.array_equal(moved, before_moved)
        assert np.array_equal(kept, before_kept)


def test_the_last_blocks_alone_are_trained() -> None:
    torch, onnx = both(llama)
    whole = random_adapter(torch.shapes, 6)
    mine = last_blocks(torch.shapes, 1)
    start = within(whole.truncated(4), mine)
    rest = Adapter(
        {n: f.take(slice(4 if n in mine else 0, None)) for n, f in whole.layers.items()},
        whole.scale,
    )
    ours, theirs = (trained(t, start, rest, steps=5) for t in (onnx, torch))
    assert apart(ours[1], theirs[1]) < ADAPTER
    assert {n for n, f in ours[1].layers.items() if f.rank} == mine


@pytest.mark.parametrize("make", [llama, gpt2])
def test_losses_and_logits_are_torchs_with_and_without_an_adapter(make: Make) -> None:
    torch, onnx = both(make)
    rows = batches(sequences(9), rows=4)
    whole = random_adapter(torch.shapes, 20)
    if make is llama:
        assert {f.rank for f in whole.layers.values()} == {4, 12, 20}  # narrow ones have less
    for frozen in (None, whole):
        found = []
        for trainer in (onnx, torch):
            trainer.load(Adapter({}, 1.0), frozen, PLAN)
            found.append((trainer.evaluate(rows), trainer.predict(rows, 5)))
        (loss, top), (loss_torch, top_torch) = found
        assert loss == pytest.approx(loss_torch, abs=1e-5)
        assert np.array_equal(top.indices, top_torch.indices)
        np.testing.assert_allclose(top.values, top_torch.values, atol=1e-4)


def test_a_base_is_left_without_an_adapter_after_one() -> None:
    _, onnx = both(llama)
    rows = batches(sequences())
    onnx.load(Adapter({}, 1.0), None, PLAN)
    before = onnx.evaluate(rows)
    onnx.load(random_adapter(onnx.shapes, 4), None, PLAN)
    assert onnx.evaluate(rows) != before
    onnx.load(Adapter({}, 1.0), None, PLAN)
    assert onnx.evaluate(rows) == before
    assert all(f.rank == 0 for f in onnx.adapter().layers.values())


@optimizers
def test_a_paused_training_goes_on_as_if_it_never_had(tmp_path: Path, optimizer: Optimizer) -> None:
    _, onnx = both(llama)
    start = random_adapter(onnx.shapes, 4)
    rows = pack(sequences(12), LENGTH, seed=1)
    settings = Training(steps=6, tokens_per_step=2 * LENGTH, max_tokens=LENGTH, warmup_steps=2)
    keeping = Keeping(tmp_path / FILE, "this training", 1e9)
    done: list[int] = []
    told: list[NotKept] = []

    def run(pause_after: int) -> Adapter:
        kept, left = read_kept(keeping, rows, PLAN.micro_batch)
        stream = left or BatchStream(rows, PLAN.micro_batch, seed=0)
        onnx.load(start, None, replace(PLAN, optimizer=optimizer))
        onnx.train(
            stream,
            settings=settings,
            learning_rate=3e-3,
            pruning=NO_PRUNING,
            on_step=lambda step, loss: done.append(step),
            between=Checkpoints(
                keeping, kept, stream.state, lambda: done[-1] == pause_after, None, told.append
            ),
        )
        return onnx.adapter()

    straight = run(0)
    with pytest.raises(TrainingPaused):
        run(3)
    resumed = run(0)
    assert done == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert apart(straight, resumed) == 0
    assert not told
