"""The torch trainer on real models: targets, training, the frozen remainder, PEFT's files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, set_seed

import base_tiny
from edge_client.data import Batch, TokenSequence, evaluation_batches, pack, text_batches
from edge_client.memory import Optimizer
from edge_client.model import describe_model, find_targets, load_model
from edge_client.plan import Plan
from edge_client.trainer.torch_trainer import TorchTrainer
from protocol.adapter import Adapter, Factors, Shapes, initial_adapter, module_rank
from protocol.factors import Trained
from protocol.files import write_peft
from protocol.messages import Pruning, Training

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TUNEFLEET_DATA", REPOSITORY.parent / "shared" / "data"))
STORIES = DATA / "models" / "stories260K"
SCALE, LENGTH, TOKENS = 2.0, 32, 90
PLAN = Plan(4, 8, 2, LENGTH, False, "f32", 1, 0.0, 0.0)
NO_PRUNING = Pruning(enabled=False)


def save_random(config: Any, folder: Path) -> Path:
    set_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=24, n_layer=3, n_head=4, n_inner=40,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return save_random(config, folder)


def llama(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return save_random(config, folder)


def tiny(folder: Path) -> Path:
    return base_tiny.PATH


def stories(folder: Path) -> Path:
    if not (STORIES / "config.json").is_file():
        pytest.skip(f"{STORIES} is not there")
    return STORIES


every_model = pytest.mark.parametrize("make", [tiny, gpt2, llama, stories])
random_models = pytest.mark.parametrize("make", [gpt2, llama])
Make = Callable[[Path], Path]


def sequences(count: int = 5) -> list[TokenSequence]:
    rng = np.random.default_rng(3)
    found = []
    for length in rng.integers(6, 16, count).tolist():
        ids = rng.integers(3, TOKENS, length).astype(np.int32)
        labels = np.append(ids[1:], -100).astype(np.int32)
        labels[: length // 4] = -100
        found.append(TokenSequence(ids, labels))
    return found


def batches(sequences: list[TokenSequence], rows: int = 2, length: int = LENGTH) -> list[Batch]:
    return list(evaluation_batches(pack(sequences, length, seed=1), rows))


def random_adapter(shapes: Shapes, rank: int, *, size: float = 0.05, seed: int = 5) -> Adapter:
    rng = np.random.default_rng(seed)
    start = initial_adapter(shapes, rank, SCALE, seed)
    return Adapter(
        {
            name: Factors(f.a, (size * rng.standard_normal(f.b.shape)).astype(np.float32))
            for name, f in start.layers.items()
        },
        SCALE,
    )


def part(adapter: Adapter, start: int, stop: int) -> Adapter:
    layers = {name: f.take(slice(start, stop)) for name, f in adapter.layers.items()}
    return Adapter(layers, adapter.scale)


def opened(folder: Path) -> TorchTrainer:
    return TorchTrainer(folder, dtype="f32", threads=1)


def train(
    trainer: TorchTrainer, batch: Batch, *, steps: int = 8, pruning: Pruning = NO_PRUNING
) -> list[float]:
    losses: list[float] = []
    trainer.train(
        repeat(batch),
        settings=Training(steps=steps, tokens_per_step=16, max_tokens=LENGTH),
        learning_rate=5e-3,
        pruning=pruning,
        on_step=lambda step, loss: losses.append(loss),
    )
    return losses


# -- targets -----------------------------------------------------------------------------------


@random_models
def test_targets_are_all_linears_of_the_blocks_with_the_shape_of_their_product(
    make: Make, tmp_path: Path
) -> None:
    found = find_targets(load_model(make(tmp_path), torch.float32))
    if make is gpt2:
        expected = {
            "attn.c_attn": (72, 24), "attn.c_proj": (24, 24),
            "mlp.c_fc": (40, 24), "mlp.c_proj": (24, 40),
        }  # fmt: skip
        prefix = "transformer.h"
    else:
        expected = {
            "self_attn.q_proj": (12, 24), "self_attn.k_proj": (4, 24),
            "self_attn.v_proj": (4, 24), "self_attn.o_proj": (24, 12),
            "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
        }  # fmt: skip
        prefix = "model.layers"
    assert found == {f"{prefix}.{i}.{n}": s for i in range(3) for n, s in expected.items()}


@every_model
def test_describing_a_model_says_what_loading_it_finds(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path)
    model = load_model(folder, torch.float32)
    described = describe_model(str(folder))
    assert described.modules == find_targets(model)
    assert described.parameters == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


# -- training ----------------------------------------------------------------------------------


@every_model
def test_training_lowers_the_loss_and_the_same_inputs_give_the_same_numbers(
    make: Make, tmp_path: Path
) -> None:
    trainer = opened(make(tmp_path))
    batch = batches(sequences())[0]
    start = initial_adapter(trainer.shapes, 4, SCALE, 0)
    weights = [p.clone() for p in trainer.model.parameters()]
    trainer.load(start, None, PLAN)
    before = trainer.evaluate([batch])
    losses = train(trainer, batch)
    first = trainer.adapter()
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert trainer.evaluate([batch]) < before - 0.01
    trainer.load(start, None, PLAN)
    assert trainer.evaluate([batch]) == before
    assert train(trainer, batch) == losses
    for name, factors in trainer.adapter().layers.items():
        np.testing.assert_array_equal(factors.a, first.layers[name].a)
        np.testing.assert_array_equal(factors.b, first.layers[name].b)
    after = trainer.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))


@random_models
def test_checkpointing_changes_no_gradient(make: Make, tmp_path: Path) -> None:
    trainer = opened(make(tmp_path))
    batch = batches(sequences())[0]
    losses = []
    for checkpointing in (False, True):
        plan = Plan(4, 8, 2, LENGTH, checkpointing, "f32", 1, 0.0, 0.0)
        trainer.load(random_adapter(trainer.shapes, 4), None, plan)
        losses.append(train(trainer, batch, steps=4))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@random_models
def test_the_frozen_remainder_takes_part_and_does_not_change(make: Make, tmp_path: Path) -> None:
    trainer = opened(make(tmp_path))
    data = batches(sequences())
    whole = random_adapter(trainer.shapes, 8, size=0.2)
    head, tail = part(whole, 0, 3), part(whole, 3, 8)
    trainer.load(whole, None, PLAN)
    together = trainer.evaluate(data)
    trainer.load(head, None, PLAN)
    alone = trainer.evaluate(data)
    trainer.load(head, tail, PLAN)
    assert trainer.evaluate(data) == pytest.approx(together, rel=1e-5)
    assert abs(alone - together) > 1e-3
    frozen = {n: [p.clone() for p in layer.frozen or ()] for n, layer in trainer.layers.items()}
    assert all(len(pair) == 2 for pair in frozen.values())
    train(trainer, data[0], steps=3)
    for name, pair in frozen.items():
        after = trainer.layers[name].frozen
        assert after is not None
        assert all(torch.equal(now, p) for now, p in zip(after, pair, strict=True))
        assert all(now.grad is None and not now.requires_grad for now in after)
    trained = trainer.adapter()
    assert trained.rank == 3
    assert all(np.abs(f.b - head.layers[n].b).max() > 0 for n, f in trained.layers.items())
    trainer.load(Adapter({}, 1.0), None, PLAN)
    bare = trainer.evaluate(data)
    trainer.load(Adapter({}, 1.0), whole, PLAN)  # as Worker.evaluate does it
    assert trainer.evaluate(data) == pytest.approx(together, rel=1e-5)
    assert abs(bare - together) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_self_pruning_makes_the_tail_smaller_than_training_without_it(
    tmp_path: Path, optimizer: Optimizer
) -> None:
    from edge_client.prune import tail_product

    trainer = opened(llama(tmp_path))
    batch = batches(sequences())[0]
    start = random_adapter(trainer.shapes, 8)
    tails = []
    for pruning in (NO_PRUNING, Pruning(gamma=0.5, penalty=1.0, rank_min=2)):
        trainer.load(start, None, replace(PLAN, optimizer=optimizer))
        train(trainer, batch, pruning=pruning)
        tails.append(tail_product(trainer.adapter(), 4))
    assert tails[1] < tail_product(start, 4)
    assert tails[1] < tails[0]


@every_model
def test_a_packed_row_has_the_loss_of_its_sequences_alone(make: Make, tmp_path: Path) -> None:
    trainer = opened(make(tmp_path))
    some = sequences(4)
    packed = batches(some, rows=1, length=64)
    assert len(packed) == 1
    assert packed[0].segments.max() == 4
    trainer.load(random_adapter(trainer.shapes, 4), None, PLAN)
    alone = [batches([s], rows=1, length=len(s))[0] for s in some]
    total = sum(trainer.evaluate([b]) * b.tokens for b in alone)
    assert trainer.evaluate(packed) == pytest.approx(total / packed[0].tokens, rel=1e-4)


# -- PEFT's files ------------------------------------------------------------------------------


@every_model
def test_peft_loads_what_we_export_and_it_means_the_same(make: Make, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = make(tmp_path / "base")
    trainer = opened(folder)
    rank = 16  # more than the narrow modules of the random models can hold
    adapter = random_adapter(trainer.shapes, rank)
    widths = {name: module_rank(shape, rank) for name, shape in trainer.shapes.items()}
    assert {n: f.rank for n, f in adapter.layers.items()} == widths
    if make is llama:
        assert len(set(widths.values())) > 1
    trainer.load(adapter, None, PLAN)
    ids = torch.randint(3, TOKENS, (1, 20), generator=torch.Generator().manual_seed(0))
    labels = np.append(ids[0, 1:].numpy(), -100).astype(np.int32)
    sequence = TokenSequence(ids[0].numpy().astype(np.int32), labels)
    ours = trainer.evaluate(batches([sequence], rows=1, length=20))
    write_peft(adapter, tmp_path / "export", base_model=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bare = float(base(input_ids=ids, labels=ids).loss.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # PEFT turns it itself
        model = PeftModel.from_pretrained(base, str(tmp_path / "export"))
    theirs = float(model(input_ids=ids, labels=ids).loss.detach())
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert abs(theirs - bare) > 1e-3


def test_a_can_learn_at_a_multiple_of_the_rate_of_b(tmp_path: Path) -> None:
    trainer, moved = opened(llama(tmp_path)), {}
    received = random_adapter(trainer.shapes, 4)
    for times in (1.0, 4.0):
        trainer.load(received, None, PLAN)
        trainer.train(
            repeat(batches(sequences())[0]),
            settings=Training(
                steps=1,
                tokens_per_step=16,
                max_tokens=LENGTH,
                warmup_steps=0,
                learning_rate_a=times,
            ),
            learning_rate=1e-3,
            pruning=NO_PRUNING,
            on_step=lambda step, loss: None,
        )
        moved[times] = trainer.adapter().layers
    for name, before in received.layers.items():
        np.testing.assert_array_equal(moved[4.0][name].b, moved[1.0][name].b)
        far, near = moved[4.0][name].a - before.a, moved[1.0][name].a - before.a
        np.testing.assert_allclose(far, 4 * near, rtol=1e-3, atol=1e-6)  # Adam's first step
        assert np.abs(near).max() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_moments_no_gradient_is_kept_and_each_micro_batch_moves_by_its_share(
    tmp_path: Path, checkpointing: bool
) -> None:
    trainer = opened(llama(tmp_path))
    start = random_adapter(trainer.shapes, 4)
    plan = replace(PLAN, optimizer="adafactor", checkpointing=checkpointing)
    rows = batches(sequences(), rows=1)
    assert len({batch.tokens for batch in rows}) > 1
    settings = Training(
        steps=1, tokens_per_step=len(rows) * LENGTH, max_tokens=LENGTH, warmup_steps=0
    )

    def moved(data: list[Batch], settings: Training, rates: list[float]) -> Adapter:
        trainer.load(start, None, plan)
        for rate, batch in zip(rates, data, strict=True):
            trainer.train(
                iter([batch] if len(rates) > 1 else rows),
                settings=settings,
                learning_rate=rate,
                pruning=NO_PRUNING,
                on_step=lambda step, loss: None,
            )
        for layer in trainer.layers.values():
            assert layer.a is not None and layer.a.grad is None
            assert layer.b is not None and layer.b.grad is None
        return trainer.adapter()

    together = moved(rows[:1], settings, [1e-2])
    counted = sum(batch.tokens for batch in rows)
    one = settings.model_copy(update={"tokens_per_step": LENGTH})
    apart = moved(rows, one, [1e-2 * batch.tokens / counted for batch in rows])
    for name, found in together.layers.items():
        np.testing.assert_allclose(found.a, apart.layers[name].a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.b, apart.layers[name].b, rtol=1e-5, atol=1e-7)
        assert np.abs(found.b - start.layers[name].b).max() > 1e-3


@pytest.mark.parametrize("factors", ["A", "B"])
def test_in_a_round_of_one_factor_the_other_has_no_gradient_and_stays(
    tmp_path: Path, factors: Trained
) -> None:
    trainer = opened(llama(tmp_path))
    whole = random_adapter(trainer.shapes, 8)
    received = part(whole, 0, 4)
    trainer.load(received, part(whole, 4, 8), PLAN)
    losses: list[float] = []
    trainer.train(
        repeat(batches(sequences())[0]),
        settings=Training(steps=6, tokens_per_step=16, max_tokens=LENGTH),
        learning_rate=5e-3,
        pruning=Pruning(),
        on_step=lambda step, loss: losses.append(loss),
        factors=factors,
    )
    assert losses[-1] < losses[0]
    for layer in trainer.layers.values():
        assert layer.a is not None and layer.b is not None
        assert (layer.a.requires_grad, layer.b.requires_grad) == (factors == "A", factors == "B")
    for name, after in trainer.adapter().layers.items():
        before = received.layers[name]
        same, moved = (after.b, before.b), (after.a, before.a)
        if factors == "B":
            same, moved = moved, same
        np.testing.assert_array_equal(*same)
        assert (moved[0] != moved[1]).any()


@pytest.mark.parametrize("make", [gpt2, llama, tiny])
def test_the_largest_logits_are_those_of_the_model_as_others_run_it(
    make: Make, tmp_path: Path
) -> None:
    trainer = opened(make(tmp_path))
    trainer.load(Adapter({}, SCALE), random_adapter(trainer.shapes, 4), PLAN)
    ids = [int(n) for n in np.random.default_rng(0).integers(2, 90, 50)]
    with torch.no_grad():
        windows = [torch.tensor([ids[at : at + 16]]) for at in range(0, 50, 16)]
        expected = torch.cat([trainer.model(window).logits[0] for window in windows]).topk(5)
    for seq_len, micro_batch in ((16, 1), (40, 1), (64, 1), (40, 3)):
        packed = list(text_batches(ids, window=16, seq_len=seq_len, micro_batch=micro_batch))
        assert {batch.ids.shape for batch in packed} == {(micro_batch, seq_len)}
        found = trainer.predict(packed, 5)
        np.testing.assert_array_equal(found.indices, expected.indices.numpy())
        np.testing.assert_allclose(found.values, expected.values.numpy(), rtol=1e-4, atol=1e-4)
    few = text_batches(ids[:3], window=16, seq_len=16, micro_batch=1)
    every = trainer.predict(few, 100_000)
    assert every.indices.shape == (3, trainer.model.config.vocab_size), "k is the vocabulary"
