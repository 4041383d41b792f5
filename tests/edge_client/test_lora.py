"""Losses and gradients of the trainer are those of transformers and PEFT, family by family."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from transformers import (
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import base_tiny
from edge_client.data import Batch
from edge_client.model import load_model
from edge_client.plan import Plan
from edge_client.trainer.blocks import _norm, _norm_trial
from edge_client.trainer.torch_trainer import DTYPES, TorchTrainer, attention_mask
from protocol.adapter import Adapter
from protocol.factors import Trained
from protocol.layers import last_blocks
from tests.edge_client.test_torch_trainer import (
    LENGTH,
    batches,
    gpt2,
    llama,
    random_adapter,
    save_random,
    sequences,
)

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
Make = Callable[[Path], Path]


def tiny(folder: Path) -> Path:
    return base_tiny.PATH


def qwen2(folder: Path) -> Path:
    """Return a model with biases at q, k and v that are not zero."""
    made = save_random(Qwen2Config(**SIZES, num_key_value_heads=2), folder)
    model = load_model(made, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(made)
    return made


def qwen3(folder: Path) -> Path:
    return save_random(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=6), folder)


def mistral(folder: Path) -> Path:
    """Return a model whose tokens see the last eight alone."""
    return save_random(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8), folder)


def gpt_neox(folder: Path) -> Path:
    return save_random(GPTNeoXConfig(**SIZES), folder)


FAMILIES = [tiny, llama, qwen2, qwen3, mistral, gpt2, gpt_neox]
every_family = pytest.mark.parametrize("make", FAMILIES)


def single(batch: Batch) -> Batch:
    """Return the batch with one sequence a row, and filler after it."""
    first = batch.segments == 1
    return Batch(
        np.where(first, batch.ids, 0),
        np.where(first, batch.labels, -100),
        np.where(first, batch.positions, 0),
        first.astype(np.int64),
    )


def halves(whole: Adapter, mine: set[str] | None = None) -> tuple[Adapter, Adapter]:
    """Return three directions to train in `mine` (None: everywhere), and all others frozen."""
    first = {n: 3 if mine is None or n in mine else 0 for n in whole.layers}
    parts = [
        Adapter({n: f.take(cut(first[n])) for n, f in whole.layers.items()}, whole.scale)
        for cut in (lambda k: slice(0, k), lambda k: slice(k, None))
    ]
    return parts[0], parts[1]


def with_peft(
    folder: Path, dtype: str, trained: Adapter, frozen: Adapter, batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss and the gradients as transformers and PEFT have them."""
    model = load_model(folder, DTYPES[dtype])
    for name, adapter in (("trained", trained), ("remainder", frozen)):
        ranks = {n: f.rank for n, f in adapter.layers.items() if f.rank}
        config = LoraConfig(
            r=adapter.rank, lora_alpha=round(adapter.scale * adapter.rank), rank_pattern=ranks,
            target_modules=list(ranks), init_lora_weights=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, model, adapter_name=name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, adapter in (("trained", trained), ("remainder", frozen)):
        for module, factors in adapter.layers.items():
            if factors.rank:
                layers[module].lora_A[name].weight.data = torch.tensor(factors.a)
                layers[module].lora_B[name].weight.data = torch.tensor(factors.b)
                layers[module].scaling[name] = adapter.scale
    for layer in layers.values():
        layer.set_adapter(["trained", "remainder"])
    inputs = {"input_ids": torch.from_numpy(batch.ids)}
    if batch.segments.max() > 1:
        inputs["position_ids"] = torch.from_numpy(batch.positions)
        inputs["attention_mask"] = attention_mask(batch, DTYPES[dtype])
    logits = model(**inputs).logits
    labels = torch.from_numpy(batch.labels).flatten()
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
    loss.backward()
    gradients = {}
    for name, layer in layers.items():
        if "trained" in layer.lora_A:
            gradients[f"{name}.a"] = layer.lora_A["trained"].weight.grad
            gradients[f"{name}.b"] = layer.lora_B["trained"].weight.grad
    return float(loss.detach()), gradients


def with_ours(
    folder: Path,
    dtype: str,
    trained: Adapter,
    frozen: Adapter,
    batch: Batch,
    *,
    factors: Trained = "both",
    **plan: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = TorchTrainer(folder, dtype=dtype, threads=1)
    trainer.load(trained, frozen, Plan(3, 8, 2, LENGTH, **{"checkpointing": False, "dtype": dtype,
        "threads": 1, "predicted_mib": 0.0, "budget_mib": 0.0, **plan}))  # fmt: skip
    trainer._train_only(factors, 1.0)
    trainer.model.train()
    loss = trainer._loss(batch)
    loss.backward()
    gradients = {}
    for name, layer in trainer.layers.items():
        for factor, tensor in (("a", layer.a), ("b", layer.b)):
            if tensor is not None and tensor.grad is not None:
                gradients[f"{name}.{factor}"] = tensor.grad
    return float(loss.detach()), gradients


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return how far all gradients are apart, as a share of their size."""
    assert set(found) == set(expected)
    apart = sum(float((found[n].float() - g).pow(2).sum()) for n, g in expected.items())
    return float((apart / sum(float(g.pow(2).sum()) for g in expected.values())) ** 0.5)


@every_family
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_are_those_of_peft(make: Make, packed: bool, tmp_path: Path) -> None:
    folder = make(tmp_path)
    if make is mistral and packed:
        pytest.skip("a mask of one's own knows nothing of windows")
    batch = batches(sequences())[0] if packed else single(batches(sequences())[0])
    whole = random_adapter(TorchTrainer(folder, dtype="f32", threads=1).shapes, 8)
    trained, frozen = halves(whole)
    loss, gradients = with_peft(folder, "f32", trained, frozen, batch)
    found, ours = with_ours(folder, "f32", trained, frozen, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize("make", [tiny, qwen2, gpt2])
def test_in_bfloat16_the_gradients_are_as_near_as_those_of_peft(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path)
    batch = batches(sequences())[0]
    whole = random_adapter(TorchTrainer(folder, dtype="f32", threads=1).shapes, 8)
    loss, exact = with_peft(folder, "f32", *halves(whole), batch)
    _, theirs = with_peft(folder, "bf16", *halves(whole), batch)
    found, ours = with_ours(folder, "bf16", *halves(whole), batch)
    assert found == pytest.approx(loss, rel=5e-3)
    assert distance(ours, exact) < max(1.25 * distance(theirs, exact), 0.02)


@pytest.mark.parametrize("make", [tiny, qwen2, gpt2])
def test_weights_stored_in_bfloat16_are_computed_with_in_float32(
    make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    rounded = load_model(make(tmp_path / "made"), torch.bfloat16)
    rounded.save_pretrained(folder)  # what is stored so loses nothing
    batch = batches(sequences())[0]
    trainer = TorchTrainer(folder, dtype="mixed", threads=1)
    stored = {trainer.model.get_submodule(n).weight.dtype for n in trainer.layers}
    assert stored == {torch.bfloat16}
    assert trainer.model.dtype == torch.float32
    whole = random_adapter(trainer.shapes, 8)
    loss, gradients = with_peft(folder, "f32", *halves(whole), batch)
    found, ours = with_ours(folder, "mixed", *halves(whole), batch)
    assert found == pytest.approx(loss, rel=1e-5)
    assert distance(ours, gradients) < 1e-5


@pytest.mark.parametrize("make", [tiny, qwen2, gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_in_the_last_block_has_the_gradients_it_has_among_all(
    make: Make, checkpointing: bool, factors: Trained, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    batch = batches(sequences())[0]
    whole = random_adapter(TorchTrainer(folder, dtype="f32", threads=1).shapes, 8)
    mine = set(last_blocks({n: (f.b.shape[0], f.a.shape[1]) for n, f in whole.layers.items()}, 1))
    trained, frozen = halves(whole, mine)
    loss, gradients = with_peft(folder, "f32", trained, frozen, batch)
    found, ours = with_ours(
        folder, "f32", trained, frozen, batch, factors=factors, checkpointing=checkpointing
    )
    assert found == pytest.approx(loss, rel=1e-5)
    expected = {n: g for n, g in gradients.items() if n.endswith(f".{factors.lower()}")}
    assert len(expected) == len(mine)
    assert distance(ours, expected) < 1e-5


def recognised(folder: Path) -> set[str]:
    """Return the classes of the modules that were given a cheaper form."""
    trainer = TorchTrainer(folder, dtype="f32", threads=1)
    return {
        type(module).__name__
        for module in trainer.model.modules()
        if "forward" in vars(module) and not isinstance(module, torch.nn.Linear)
    }


def test_what_only_looks_alike_stays_as_it_is(tmp_path: Path) -> None:
    assert recognised(qwen2(tmp_path / "a")) == {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention"}
    # its attention norms q and k, which the cheaper form does not
    assert recognised(qwen3(tmp_path / "b")) == {"Qwen3RMSNorm", "Qwen3MLP"}
    gelu = LlamaConfig(**SIZES, num_key_value_heads=2, hidden_act="gelu")
    assert recognised(save_random(gelu, tmp_path / "c")) == {"LlamaRMSNorm", "LlamaAttention"}
    plus_one = GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=6)
    assert recognised(save_random(plus_one, tmp_path / "d")) == {"GemmaAttention"}
    assert not recognised(gpt_neox(tmp_path / "e"))
    every_other = SmolLM3Config(
        **SIZES, num_key_value_heads=2, no_rope_layers=[1, 0], pad_token_id=0
    )
    trainer = TorchTrainer(save_random(every_other, tmp_path / "f"), dtype="f32", threads=1)
    turned = ["forward" in vars(block.self_attn) for block in trainer.model.model.layers]
    assert turned == [True, False], "its second block has no rotary positions"


def test_what_is_kept_for_the_backward_pass_is_no_more_than_the_inputs(tmp_path: Path) -> None:
    """Of a token and block, in numbers: what a Llama of these widths must keep."""
    trainer = TorchTrainer(llama(tmp_path), dtype="f32", threads=1)
    batch = single(batches(sequences())[0])
    rank, hidden, ffn, heads, keys = 2, 24, 40, 12, 4
    trainer.load(random_adapter(trainer.shapes, rank), None, Plan(
        rank, rank, 2, LENGTH, False, "f32", 1, 0.0, 0.0))  # fmt: skip
    trainer.model.train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer._loss(batch)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in weights) / 4
    tokens, blocks = batch.ids.size, 3
    # both norms' input and output, q, k, v, what attention gives and its log-sum-exp, gate and up
    block = 4 * hidden + heads + 2 * keys + heads + 6 + 2 * ffn + 2 + 7 * rank
    beyond = 2 * hidden + 1  # the last norm, and the loss's gradient
    turns = 2 * 2  # cos and sin
    assert total / tokens <= blocks * block + beyond + turns
    loss.backward()


def test_only_the_first_blocks_are_made_again(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    batch = batches(sequences())[0]
    whole = random_adapter(TorchTrainer(folder, dtype="f32", threads=1).shapes, 8)
    loss, gradients = with_ours(folder, "f32", *halves(whole), batch)
    kept = []
    for blocks in (1, 2, 0):
        stored: dict[int, int] = {}

        def keep(tensor: torch.Tensor, into: dict[int, int] = stored) -> torch.Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found, ours = with_ours(
                folder, "f32", *halves(whole), batch, checkpointing=True, checkpoint_blocks=blocks
            )
        assert found == loss
        assert distance(ours, gradients) < 1e-6
        kept.append(sum(stored.values()))
    assert kept[0] > kept[1] > kept[2]


def test_a_norm_with_another_epsilon_is_left_as_it_is() -> None:
    class ToyRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.epsilon = torch.nn.Parameter(torch.ones(16)), 1e-4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)

    toy = ToyRMSNorm()
    assert not _norm_trial(toy, _norm(toy, {}), torch.float32)
    toy.variance_epsilon = toy.epsilon
    assert _norm_trial(toy, _norm(toy, {}), torch.float32)
