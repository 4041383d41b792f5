"""The torch trainer: PEFT's LoRA layers and a short loop of our own.

A device holds two PEFT adapters on the frozen base: `trained`, of its own rank, and `remainder`,
the other directions of the shared adapter, which take part in the forward pass without gradient
or optimiser state (docs/algorithms.md, frozen remainder).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_client.data import Batch, block_causal_mask
from edge_client.model import find_targets, load_model
from edge_client.plan import Plan
from edge_client.prune import head_rank, penalty
from edge_client.trainer.base import OnStep, TrainReport, step_batches
from edge_client.trainer.loss import CHUNK_TOKENS, chunked_cross_entropy, full_cross_entropy
from protocol.adapter import Adapter, Factors
from protocol.factors import Trained
from protocol.messages import Pruning, Training
from protocol.probe import TopLogits

TRAINED, REMAINDER = "trained", "remainder"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ADAM_BETAS = (0.9, 0.99)


class TorchTrainer:
    """Implement `edge_client.trainer.base.Trainer` on torch."""

    def __init__(self, model_folder: Path, *, dtype: str, threads: int) -> None:
        self.use_threads(threads)
        self.model = load_model(model_folder, DTYPES[dtype])
        self.shapes = find_targets(self.model)
        self.scale = 1.0
        self._layers: dict[str, Any] = {}
        self._plain_head: bool | None = None

    def use_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def load(self, trained: Adapter, frozen: Adapter | None, plan: Plan) -> None:
        self.scale = trained.scale
        self._put(TRAINED, trained, torch.float32)
        self._put(REMAINDER, frozen, self.model.dtype)
        parts = {TRAINED: trained, REMAINDER: frozen}
        active = [name for name, part in parts.items() if part is not None and part.rank]
        for layer in self._layers.values():
            layer.set_adapter(active)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{TRAINED}." in name)
        self._checkpointing(plan.checkpointing)

    def train(
        self,
        batches: Iterator[Batch],
        *,
        settings: Training,
        learning_rate: float,
        pruning: Pruning | None,
        on_step: OnStep,
        factors: Trained = "both",
    ) -> TrainReport:
        started = time.monotonic()
        self._train_only(factors)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The basis of A and B turns with every product merge: moments start anew each round.
        optimizer = torch.optim.AdamW(
            self._rated(settings.learning_rate_a),
            lr=learning_rate,
            betas=ADAM_BETAS,
            weight_decay=settings.weight_decay,
            foreach=False,
        )
        losses, tokens = [], 0
        self.model.train()
        for step in range(1, settings.steps + 1):
            warm = min(1.0, step / (settings.warmup_steps + 1))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["times"] * warm
            group_of = step_batches(batches, settings.tokens_per_step)
            counted = sum(batch.tokens for batch in group_of)
            loss = self._accumulate(group_of, counted)
            self._press_tail(pruning)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm, foreach=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            tokens += counted
            on_step(step, loss)
        return TrainReport(
            settings.steps, tokens, float(np.mean(losses)), time.monotonic() - started
        )

    def _rated(self, times_of_a: float) -> list[dict[str, Any]]:
        """Return what is trained in groups: A, at so many `times` the rate of B, and B."""
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if factor in name], "times": times}
            for factor, times in (("lora_A", times_of_a), ("lora_B", 1.0))
        ]
        return [group for group in groups if group["params"]]

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
                name: Factors(
                    layer.lora_A[TRAINED].weight.detach().numpy().copy(),
                    layer.lora_B[TRAINED].weight.detach().numpy().copy(),
                )
                if (layer := self._layers.get(name)) and TRAINED in layer.lora_A
                else _empty(shape)
                for name, shape in self.shapes.items()
            },
            self.scale,
        )

    def _train_only(self, factors: Trained) -> None:
        for name, parameter in self.model.named_parameters():
            if f".{TRAINED}." in name:
                parameter.requires_grad_(factors == "both" or f".lora_{factors}." in name)

    # -- a step ----------------------------------------------------------------------------------

    def _accumulate(self, batches: list[Batch], counted: int) -> float:
        """Add up gradients of the mean loss over all tokens of a step; return that loss."""
        total = 0.0
        for batch in batches:
            loss = self._loss(batch) / counted
            loss.backward()
            total += float(loss.detach())
        return total

    def _press_tail(self, pruning: Pruning | None) -> None:
        if pruning is None or not pruning.enabled:
            return
        factors = [
            (layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight)
            for layer in self._layers.values()
            if TRAINED in layer.lora_A
        ]
        rank = max(a.shape[0] for a, _ in factors)
        total = penalty(factors, head_rank(rank, pruning.gamma, pruning.rank_min))
        if isinstance(total, torch.Tensor):
            (pruning.penalty * total).backward()

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
        return {
            "input_ids": torch.from_numpy(batch.ids),  # (B, S)
            "position_ids": torch.from_numpy(batch.positions),
            "attention_mask": attention_mask(batch, self.model.dtype),
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
        few = {k: v[:1, ..., :8] for k, v in inputs.items()}
        few["attention_mask"] = inputs["attention_mask"][:1, :, :8, :8]
        head = self.model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            return False
        ours = self.model.base_model(**few).last_hidden_state @ head.weight.T
        return torch.allclose(ours.float(), self.model(**few).logits.float(), atol=1e-2, rtol=1e-2)

    # -- the adapters on the model ---------------------------------------------------------------

    def _put(self, name: str, adapter: Adapter | None, dtype: torch.dtype) -> None:
        """Give the model a PEFT adapter with these factors, in place of the one of that name."""
        from peft.tuners.lora import LoraLayer

        for layer in self._layers.values():
            if name in layer.lora_A:
                layer.delete_adapter(name)
        if adapter is None or adapter.rank == 0:
            return
        self._inject(name, adapter)
        self._layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LoraLayer)}
        for module, factors in adapter.layers.items():
            if factors.rank:
                layer = self._layers[module]
                layer.lora_A[name].weight.data = torch.tensor(factors.a, dtype=dtype)
                layer.lora_B[name].weight.data = torch.tensor(factors.b, dtype=dtype)
                layer.scaling[name] = adapter.scale

    def _inject(self, name: str, adapter: Adapter) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        ranks = {n: f.rank for n, f in adapter.layers.items() if f.rank}
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=math.ceil(adapter.scale * adapter.rank),
            rank_pattern={f"^{n}": r for n, r in ranks.items() if r != adapter.rank},
            target_modules=list(ranks),
            lora_dropout=0.0,
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            # PEFT warns of a second adapter on one model; here that is the point.
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, self.model, adapter_name=name)

    def _checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


def attention_mask(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask (B, 1, S, S) of a packed batch: 0 where position i may see j."""
    hidden = ~torch.from_numpy(block_causal_mask(batch.segments))[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def _empty(shape: tuple[int, int]) -> Factors:
    d_out, d_in = shape
    return Factors(np.zeros((0, d_in), np.float32), np.zeros((d_out, 0), np.float32))
