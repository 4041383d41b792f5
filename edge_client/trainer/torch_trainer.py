"""The torch trainer: LoRA on a frozen base, and a short loop.

Beside every linear module of the blocks lie two parts of an adapter: what is trained, of the
device's own rank, and the remainder, the other directions of the shared adapter, which take part in
the forward pass without gradient or optimiser state (docs/algorithms.md, frozen remainder).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_client.data import Batch, block_causal_mask
from edge_client.memory import Optimizer
from edge_client.model import find_blocks, find_targets, load_model
from edge_client.plan import Plan
from edge_client.trainer.base import Between, OnStep, TrainReport, step_batches
from edge_client.trainer.blocks import checkpoint_blocks, speed_up
from edge_client.trainer.lora import LoraLinear
from edge_client.trainer.loss import CHUNK_TOKENS, chunked_cross_entropy, full_cross_entropy
from edge_client.trainer.torch_adafactor import TorchAdafactor
from edge_client.trainer.torch_press import Press
from edge_client.trainer.torch_state import TorchState
from protocol.adapter import Adapter, Factors
from protocol.factors import Trained
from protocol.messages import Pruning, Training
from protocol.probe import TopLogits

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}
"""What is computed in; "mixed" stores the blocks' frozen weights in bfloat16."""
STORED = {**DTYPES, "mixed": torch.bfloat16}
ADAM_BETAS = (0.9, 0.99)


class TorchTrainer:
    """Implement `edge_client.trainer.base.Trainer` on torch."""

    def __init__(self, model_folder: Path, *, dtype: str, threads: int) -> None:
        self._begin(load_model(model_folder, STORED[dtype]), dtype, threads)

    @classmethod
    def of(cls, model: Any, *, dtype: str, threads: int) -> TorchTrainer:
        """Return the trainer of a frozen model that is in memory."""
        trainer = cls.__new__(cls)
        trainer._begin(model, dtype, threads)
        return trainer

    def _begin(self, model: Any, dtype: str, threads: int) -> None:
        self.use_threads(threads)
        self.model = model
        self.shapes = find_targets(model)
        self.scale = 1.0
        self.layers = {n: LoraLinear(model.get_submodule(n)) for n in self.shapes}
        self._dtype = DTYPES[dtype]
        if STORED[dtype] != self._dtype:
            self._widen()
        speed_up(model, self.layers, self._dtype)
        self._plain_head: bool | None = None
        self._optimizer: Optimizer = "adamw"

    def use_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def _widen(self) -> None:
        """Turn all but the weights that layers widen themselves, one at a time, into float32."""
        stored = {id(self.model.get_submodule(name).weight) for name in self.layers}
        for parameter in self.model.parameters():
            if id(parameter) not in stored:
                parameter.data = parameter.data.to(self._dtype)

    def load(self, trained: Adapter, frozen: Adapter | None, plan: Plan) -> None:
        self.scale, self._optimizer = trained.scale, plan.optimizer
        rest = frozen or Adapter({}, 1.0)
        for name, layer in self.layers.items():
            layer.train(trained.layers.get(name), trained.scale)
            layer.freeze(rest.layers.get(name), rest.scale, self._dtype)
        blocks = find_blocks(self.model)[1]
        checkpoint_blocks(
            blocks, plan.checkpoint_blocks or len(blocks) if plan.checkpointing else 0
        )

    def train(
        self,
        batches: Iterator[Batch],
        *,
        settings: Training,
        learning_rate: float,
        pruning: Pruning | None,
        on_step: OnStep,
        factors: Trained = "both",
        between: Between | None = None,
    ) -> TrainReport:
        started = time.monotonic()
        optimizer = self._open_optimizer(self._train_only(factors, settings.learning_rate_a))
        press = self._press(pruning)
        for group in optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay
        state = TorchState(optimizer)
        losses, tokens = between.begin(state) if between else ([], 0)
        self.model.train()
        at_once = optimizer.moving(press) if isinstance(optimizer, TorchAdafactor) else None
        with at_once or nullcontext():
            for step in range(len(losses) + 1, settings.steps + 1):
                warm = min(1.0, step / (settings.warmup_steps + 1))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * group["times"] * warm
                group_of = step_batches(batches, settings.tokens_per_step)
                counted = sum(batch.tokens for batch in group_of)
                if isinstance(optimizer, TorchAdafactor):
                    loss = self._move_by_each(optimizer, press, group_of, counted)
                else:
                    loss = self._accumulate(group_of, counted)
                    _move(optimizer, press, settings.clip_norm)
                losses.append(loss)
                tokens += counted
                on_step(step, loss)
                if between and step < settings.steps:
                    between.after_step(state, losses, tokens)
        return TrainReport(
            settings.steps, tokens, float(np.mean(losses)), time.monotonic() - started
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        self.model.eval()
        total, counted = 0.0, 0
        for batch in batches:
            total += float(self._loss(batch))
            counted += batch.tokens
        return total / max(counted, 1)

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch], top_k: int) -> TopLogits:
        self.model.eval()
        indices, values = [], []
        for batch in batches:
            at = 0
            for logits in self._logits(self._inputs(batch)):
                top = logits.float().topk(min(top_k, logits.shape[-1]))
                tokens = batch.segments.flatten()[at : at + len(logits)] > 0
                indices.append(top.indices.numpy().astype(np.uint32)[tokens])
                values.append(top.values.numpy()[tokens])
                at += len(logits)
        return TopLogits(np.concatenate(indices), np.concatenate(values))

    def adapter(self) -> Adapter:
        return Adapter(
            {
                name: _empty(self.shapes[name])
                if layer.a is None or layer.b is None
                else Factors(layer.a.detach().numpy().copy(), layer.b.detach().numpy().copy())
                for name, layer in self.layers.items()
            },
            self.scale,
        )

    def _open_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self._optimizer == "adafactor":
            return TorchAdafactor(groups)
        # The basis of A and B turns with every product merge: moments start anew each round.
        return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)

    def _train_only(self, factors: Trained, times_of_a: float) -> list[dict[str, Any]]:
        """Return what is trained in groups: A, at so many times the rate of B, and B."""
        groups: list[dict[str, Any]] = [
            {"params": [], "times": times_of_a},
            {"params": [], "times": 1.0},
        ]
        for layer in self.layers.values():
            for name, factor, group in zip("AB", (layer.a, layer.b), groups, strict=True):
                if factor is not None:
                    factor.requires_grad_(factors in (name, "both"))
                    factor.grad = None
                    if factor.requires_grad:
                        group["params"].append(factor)
        return [group for group in groups if group["params"]]

    # -- a step ----------------------------------------------------------------------------------

    def _accumulate(self, batches: list[Batch], counted: int) -> float:
        """Add up gradients of the mean loss over all tokens of a step; return that loss."""
        total = 0.0
        for batch in batches:
            loss = self._loss(batch) / counted
            loss.backward()
            total += float(loss.detach())
        return total

    def _move_by_each(
        self, optimizer: TorchAdafactor, press: Press, batches: list[Batch], counted: int
    ) -> float:
        """Move by the gradients of each micro-batch as they come; return a step's mean loss."""
        total = 0.0
        for batch in batches:
            optimizer.share = batch.tokens / counted
            press.begin()
            loss = self._loss(batch)
            (loss / max(1, batch.tokens)).backward()
            total += float(loss.detach())
        return total / counted

    def _press(self, pruning: Pruning | None) -> Press:
        factors = [
            (layer.a, layer.b)
            for layer in self.layers.values()
            if layer.a is not None and layer.b is not None
        ]
        return Press(factors, pruning)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss of a packed batch, in nats."""
        inputs = self._inputs(batch)
        labels = torch.from_numpy(batch.labels).flatten()
        if self._has_plain_head(inputs):
            hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            weight = self.model.get_output_embeddings().weight
            return chunked_cross_entropy(hidden, weight, labels)
        return full_cross_entropy(self.model(**inputs).logits.flatten(0, 1), labels)

    def _logits(self, inputs: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield logits (n, vocabulary), few positions at a time where the head allows it."""
        if self._has_plain_head(inputs):
            hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            weight = self.model.get_output_embeddings().weight
            for part in hidden.split(CHUNK_TOKENS):
                yield part @ weight.T
        else:
            yield self.model(**inputs).logits.flatten(0, 1)

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(batch.ids)  # (B, S)
        if batch.segments.max() <= 1:
            # Nothing to keep apart: what comes before a token is its own text, and filler, which
            # nobody looks at, comes last. Of such a mask transformers makes the causal rule.
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {
            "input_ids": ids,
            "position_ids": torch.from_numpy(batch.positions),
            "attention_mask": attention_mask(batch, self._dtype),
        }

    def _has_plain_head(self, inputs: dict[str, torch.Tensor]) -> bool:
        if self._plain_head is None:
            self._plain_head = self._head_only_multiplies(inputs)
        return self._plain_head

    @torch.no_grad()
    def _head_only_multiplies(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Try whether logits are hidden states times the head's weight, and nothing more.

        Some families scale or cap their logits; those take the loss on whole logits.
        """
        few = {"input_ids": inputs["input_ids"][:1, :8]}
        head = self.model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            return False
        ours = self.model.base_model(**few).last_hidden_state @ head.weight.T
        return torch.allclose(ours.float(), self.model(**few).logits.float(), atol=1e-2, rtol=1e-2)


def _move(optimizer: torch.optim.Optimizer, press: Press, clip_norm: float) -> None:
    """Move by the gradients that a step's micro-batches have added up."""
    press.all()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def attention_mask(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask (B, 1, S, S) of a packed batch: 0 where position i may see j."""
    hidden = ~torch.from_numpy(block_causal_mask(batch.segments))[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def _empty(shape: tuple[int, int]) -> Factors:
    d_out, d_in = shape
    return Factors(np.zeros((0, d_in), np.float32), np.zeros((d_out, 0), np.float32))
