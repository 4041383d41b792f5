"""Training the last blocks alone: which are chosen, and that nothing is kept of those below."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import edge_client.prepare
from edge_client.errors import ConfigError, NoPlanFits
from edge_client.learning import learn
from edge_client.plan import Plan
from edge_client.prepare import block_choices, make_plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.torch_trainer import TorchTrainer
from protocol.adapter import Adapter
from protocol.layers import block_of, from_bitmap, last_blocks
from protocol.messages import BaseModelInfo, Job
from tests.edge_client.test_torch_trainer import (
    LENGTH,
    PLAN,
    batches,
    llama,
    opened,
    random_adapter,
    sequences,
    train,
)

MODULES = {f"l.{n}.q": (6, 5) for n in range(6)}


def job(layers: str = "fit", **more: Any) -> Job:
    base = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1, modules=MODULES)
    fields = {"job": "notes", "base": base, "scale": 2.0, "ladder": [2, 4], "layers": layers}
    return Job.model_validate({**fields, **more})


def owner(train_blocks: int = 0) -> Any:
    return SimpleNamespace(train_blocks=train_blocks)


def test_the_choice_halves_where_the_job_allows_it_and_the_owner_may_name_it() -> None:
    assert block_choices(owner(), job("all")) == [0]
    assert block_choices(owner(), job()) == [0, 3, 1]
    assert block_choices(owner(2), job()) == [2]
    assert block_choices(owner(6), job()) == [0]
    with pytest.raises(ConfigError, match="--train-blocks 2: job 'notes' has every device train"):
        block_choices(owner(2), job("all"))
    with pytest.raises(ConfigError, match="the job's model has 6 blocks"):
        block_choices(owner(7), job())


def test_fewer_blocks_are_trained_only_where_no_plan_of_all_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def plan_of(
        settings: Any, job: Job, model: Path, blocks: int, below_mib: float, backend: str
    ) -> Plan:
        tried.append(blocks)
        if blocks != fits:
            raise NoPlanFits(f"{blocks} do not fit")
        return Plan(2, 4, 1, 64, True, "f32", 1, 1.0, 2.0, blocks)

    monkeypatch.setattr(edge_client.prepare, "_plan_of", plan_of)
    for fits, found in ((0, [0]), (1, [0, 3, 1])):
        tried.clear()
        plan = make_plan(owner(), job(), Path())
        assert (plan.blocks, tried) == (fits, found)
    assert "rank 2 of 4 held in the last 1 block, 1×64 tokens" in str(plan)
    fits = -1
    with pytest.raises(NoPlanFits, match="0 do not fit"):
        make_plan(owner(), job(), Path())


def test_a_round_of_some_blocks_sends_these_and_holds_the_rest_frozen() -> None:
    held = random_adapter(MODULES, 4)
    seen: list[tuple[Adapter, Adapter | None]] = []

    def train(received: Adapter, frozen: Adapter | None) -> tuple[Adapter, TrainReport]:
        seen.append((received, frozen))
        return received, TrainReport(1, 10, 1.0, 0.0)

    learned = learn(job(), "desk", held, 2, 1, train, blocks=2)
    assert learned.modules is not None
    assert {block_of(n) for n in from_bitmap(MODULES, learned.modules)} == {4, 5}
    ((received, frozen),) = seen
    assert frozen is not None
    for name in MODULES:
        trained = 2 if block_of(name) in (4, 5) else 0
        assert received.layers[name].rank == learned.change.layers[name].rank == trained
        assert frozen.layers[name].rank == 4 - trained
    assert learn(job(), "desk", held, 2, 1, train).modules is None


def load(trainer: TorchTrainer, whole: Adapter, blocks: int, *, checkpointing: bool) -> None:
    """Load rank 4 of an adapter in the last blocks to be trained, all else of it frozen."""
    plan = Plan(4, 8, 2, LENGTH, checkpointing, "f32", 1, 0.0, 0.0, blocks)
    modules = last_blocks(trainer.shapes, blocks)
    first = {name: 4 if name in modules else 0 for name in whole.layers}
    trained = {n: f.take(slice(0, first[n])) for n, f in whole.layers.items()}
    rest = {n: f.take(slice(first[n], 8)) for n, f in whole.layers.items()}
    trainer.load(Adapter(trained, whole.scale), Adapter(rest, whole.scale), plan)


def test_no_activation_of_a_block_below_is_kept(tmp_path: Path) -> None:
    trainer = opened(llama(tmp_path))
    whole = random_adapter(trainer.shapes, 8)
    kept: dict[int, int] = {}
    for blocks in (0, 2, 1):
        load(trainer, whole, blocks, checkpointing=False)
        stored: dict[int, int] = {}

        def store(tensor: torch.Tensor, into: dict[int, int] = stored) -> torch.Tensor:
            into[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        trainer.model.train()
        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            trainer._loss(batches(sequences())[0])
        kept[blocks] = sum(stored.values())
    one_block = kept[2] - kept[1]
    assert kept[0] - kept[2] == pytest.approx(one_block, rel=0.2)
    assert one_block > 0.2 * kept[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_block_learns_alone_and_the_others_act_as_they_were(
    tmp_path: Path, checkpointing: bool
) -> None:
    trainer = opened(llama(tmp_path))
    whole = random_adapter(trainer.shapes, 8)
    batch = batches(sequences())[0]
    trainer.load(Adapter({}, 1.0), whole, PLAN)
    received = trainer.evaluate([batch])
    load(trainer, whole, 1, checkpointing=checkpointing)
    assert trainer.evaluate([batch]) == pytest.approx(received, abs=1e-5)
    losses = train(trainer, batch)
    assert losses[-1] < losses[0]
    mine = last_blocks(trainer.shapes, 1)
    for name, factors in trainer.adapter().layers.items():
        assert factors.rank == (4 if name in mine else 0)
        if name in mine:
            assert (factors.b != whole.layers[name].take(slice(0, 4)).b).any()
