"""Folding what is frozen into the base gives the losses and steps of the device's own trainer."""

import numpy as np
import pytest

from base_tiny import PATH
from benchmarks.folding import FoldingTrainer
from edge_client.data import BatchStream, evaluation_batches
from edge_client.data.pack import PackedRow
from edge_client.plan import Plan
from edge_client.trainer.torch_trainer import TorchTrainer
from protocol.adapter import Adapter, Factors, initial_adapter
from protocol.messages import Training

PLAN = Plan(1, 1, 2, 32, False, "f32", 1, 0.0, 0.0)
NOTHING = Adapter({}, 1.0)


def rows(count: int = 8, length: int = 32) -> list[PackedRow]:
    rng = np.random.default_rng(0)
    line, ones = np.arange(length, dtype=np.int32), np.ones(length, np.int32)
    return [
        PackedRow(ids, np.roll(ids, -1), line, ones)
        for ids in rng.integers(3, 500, (count, length)).astype(np.int32)
    ]


def shared(trainer: TorchTrainer) -> Adapter:
    rng = np.random.default_rng(1)
    whole = initial_adapter(trainer.shapes, 8, 2.0, 0)
    return Adapter(
        {
            name: Factors(f.a, 0.02 * rng.standard_normal(f.b.shape).astype(np.float32))
            for name, f in whole.layers.items()
        },
        2.0,
    )


def test_it_trains_as_the_devices_trainer_does():
    own, folding = TorchTrainer(PATH, dtype="f32", threads=1), FoldingTrainer(PATH, threads=1)
    whole = shared(own)
    settings = Training(steps=3, tokens_per_step=64, max_tokens=32)
    for rank in (4, 2, 6):  # a smaller and a larger one into the same layers
        rest = Adapter({n: f.take(slice(rank, None)) for n, f in whole.layers.items()}, 2.0)
        found = []
        for trainer in (own, folding):
            trainer.load(whole.truncated(rank), rest, PLAN)
            report = trainer.train(
                BatchStream(rows(), 2, seed=0),
                settings=settings,
                learning_rate=2e-3,
                pruning=None,
                on_step=lambda step, loss: None,
            )
            held_out = trainer.evaluate(evaluation_batches(rows(), 4))
            found.append((report.loss, held_out, trainer.adapter()))
        (loss, held_out, adapter), (folded_loss, folded_held_out, folded) = found
        assert folded_loss == pytest.approx(loss, rel=1e-5)
        assert folded_held_out == pytest.approx(held_out, rel=1e-4)
        for name, factors in adapter.layers.items():
            np.testing.assert_allclose(folded.layers[name].b, factors.b, atol=2e-3)


def test_nothing_is_left_behind():
    folding = FoldingTrainer(PATH, threads=1)
    folding.load(NOTHING, None, PLAN)
    base = folding.evaluate(evaluation_batches(rows(), 4))
    folding.load(shared(folding), None, PLAN)
    trained = folding.evaluate(evaluation_batches(rows(), 4))
    folding.load(NOTHING, shared(folding), PLAN)
    assert folding.evaluate(evaluation_batches(rows(), 4)) == pytest.approx(trained, rel=1e-5)
    assert trained != pytest.approx(base, rel=1e-3)
    folding.load(NOTHING, None, PLAN)
    assert folding.evaluate(evaluation_batches(rows(), 4)) == base
