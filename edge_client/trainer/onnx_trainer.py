"""The ONNX Runtime trainer: a graph that returns loss and gradients, and optimisers in numpy.

No torch, transformers or peft is loaded. The graph (edge_client/ort) takes the factors as inputs,
so one graph serves every rank, and an adapter that was cut is just a smaller input. The scale s is
multiplied into B on the way in and into its gradient on the way out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.data import Batch, block_causal_mask
from edge_client.memory import Optimizer
from edge_client.ort.artifact import (
    FACTORS,
    FROZEN,
    TRAINED,
    factor_name,
    gradient_name,
    map_weight,
    read_artifact,
)
from edge_client.ort.runtime import open_session, path_to_fetches
from edge_client.plan import Plan
from edge_client.prune import head_rank, penalty_gradient
from edge_client.trainer.adafactor import Adafactor
from edge_client.trainer.adamw import AdamW, clip
from edge_client.trainer.base import Between, OnStep, TrainReport, step_batches
from protocol.adapter import Adapter, Factors
from protocol.artifact import GRAPH, WEIGHTS
from protocol.factors import Trained
from protocol.messages import Pruning, Training
from protocol.probe import TopLogits

FloatArray = NDArray[np.float32]
Arrays = dict[str, FloatArray]
UNSEEN = np.finfo(np.float32).min
"""What is added to the score of a position that may not be looked at."""
LOGIT_ROWS = 64
# The basis of A and B turns with every product merge: moments start anew each round.
OPTIMISERS: Mapping[Optimizer, type[AdamW | Adafactor]] = {
    "adamw": AdamW,
    "adafactor": Adafactor,
}


class OnnxTrainer:
    """Implement `edge_client.trainer.base.Trainer` on ONNX Runtime.

    Raises:
        ModelError: the artifact set is not whole.
    """

    def __init__(self, artifact: Path, *, threads: int) -> None:
        self._folder = artifact
        read = read_artifact(artifact)
        self.shapes = read.modules
        self.scale = 1.0
        self._head = read.head
        self._micro_batch = 1
        self._optimizer: Optimizer = "adamw"
        self._ranks: dict[str, int] = {}
        self._factors: Arrays = {}
        self._session: Any = None
        self.use_threads(threads)

    def use_threads(self, count: int) -> None:
        self._session = None  # two at once would map the base twice
        self._session = open_session(self._folder / GRAPH, count)

    def load(self, trained: Adapter, frozen: Adapter | None, plan: Plan) -> None:
        self.scale = trained.scale
        self._micro_batch, self._optimizer = plan.micro_batch, plan.optimizer
        self._factors = {}
        self._ranks = self._put(TRAINED, trained, 1.0)
        # The trained part is scaled when it has been moved, at each step.
        self._put(FROZEN, frozen, 1.0 if frozen is None else frozen.scale)

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
        parameters = self._trained(factors)
        optimiser = OPTIMISERS[self._optimizer](parameters, weight_decay=settings.weight_decay)
        losses, tokens = between.begin(optimiser) if between else ([], 0)
        for step in range(len(losses) + 1, settings.steps + 1):
            warm = min(1.0, step / (settings.warmup_steps + 1))
            rates = {
                name: learning_rate * warm * (settings.learning_rate_a if _is_a(name) else 1.0)
                for name in parameters
            }
            group = step_batches(batches, settings.tokens_per_step)
            counted = sum(batch.tokens for batch in group)
            loss = 0.0
            for part in self._parts(group):
                own = sum(batch.tokens for batch in part)
                share = own / counted
                mean, gradients = self._accumulate(part, max(1, own), list(parameters))
                self._press_tail(pruning, gradients)
                if self._optimizer == "adamw":
                    clip(gradients, settings.clip_norm)
                optimiser.step(gradients, {name: share * rate for name, rate in rates.items()})
                loss += share * mean
                del gradients  # before the next come
            losses.append(loss)
            tokens += counted
            on_step(step, loss)
            if between and step < settings.steps:
                between.after_step(optimiser, losses, tokens)
        return TrainReport(
            settings.steps, tokens, float(np.mean(losses)), time.monotonic() - started
        )

    def evaluate(self, batches: Iterable[Batch]) -> float:
        total, counted = 0.0, 0
        factors = self._inputs()
        for batch in self._small(batches):
            (loss,) = self._run(["loss"], batch, factors)
            total += float(loss)
            counted += batch.tokens
        return total / max(counted, 1)

    def predict(self, batches: Iterable[Batch], top_k: int) -> TopLogits:
        weight = map_weight(self._folder / WEIGHTS, self._head)  # (V, d)
        indices, values = [], []
        factors = self._inputs()
        for batch in self._small(batches):
            (hidden,) = self._run(["hidden"], batch, factors)
            hidden = hidden[batch.segments.flatten() > 0]
            for start in range(0, len(hidden), LOGIT_ROWS):
                index, value = _top(hidden[start : start + LOGIT_ROWS] @ weight.T, top_k)
                indices.append(index)
                values.append(value)
        return TopLogits(np.concatenate(indices), np.concatenate(values))

    def adapter(self) -> Adapter:
        return Adapter(
            {
                name: Factors(
                    self._factors[factor_name(TRAINED, name, "a")][:rank].copy(),
                    self._factors[factor_name(TRAINED, name, "b")][:, :rank].copy(),
                )
                for name in self.shapes
                for rank in [self._ranks.get(name, 0)]
            },
            self.scale,
        )

    # -- a step ----------------------------------------------------------------------------------

    def _parts(self, group: Sequence[Batch]) -> Sequence[Sequence[Batch]]:
        """Return a step's micro-batches as they move the factors: together, or each by itself."""
        return [[batch] for batch in group] if self._optimizer == "adafactor" else [group]

    def _accumulate(
        self, batches: Sequence[Batch], counted: int, names: Sequence[str]
    ) -> tuple[float, Arrays]:
        """Return the mean loss over all tokens of a step, and its gradients."""
        total, sums = 0.0, Arrays()
        factors = self._inputs()
        fetches = ["loss", *(gradient_name(name) for name in names)]
        for batch in batches:
            loss, *gradients = self._run(fetches, batch, factors)
            total += float(loss)
            for name, gradient in zip(names, gradients, strict=True):
                if name in sums:
                    sums[name] += gradient
                else:
                    sums[name] = gradient
        for name, gradient in sums.items():
            gradient *= np.float32((1.0 if _is_a(name) else self.scale) / counted)
        return total / counted, sums

    def _press_tail(self, pruning: Pruning | None, gradients: Arrays) -> None:
        if pruning is None or not pruning.enabled:
            return
        head = head_rank(max(self._ranks.values()), pruning.gamma, pruning.rank_min)
        for module in self._ranks:
            a, b = (factor_name(TRAINED, module, factor) for factor in FACTORS)
            found = penalty_gradient(self._factors[a], self._factors[b], head)
            if found is None:
                continue
            if a in gradients:
                gradients[a][head:] += np.float32(pruning.penalty) * found[0]
            if b in gradients:
                gradients[b][:, head:] += np.float32(pruning.penalty) * found[1]

    def _run(self, fetches: Sequence[str], batch: Batch, factors: Arrays) -> list[FloatArray]:
        """Compute what is asked for, and nothing that it does not take."""
        seen = block_causal_mask(batch.segments)[:, None]
        inputs = {
            "ids": batch.ids,  # (B, S)
            "positions": batch.positions,
            "labels": batch.labels,
            "mask": np.where(seen, np.float32(0), UNSEEN),  # (B, 1, S, S)
        }
        found: list[FloatArray] = self._session.run(
            list(fetches), {**inputs, **factors}, path_to_fetches()
        )
        return found

    def _inputs(self) -> Arrays:
        """Return the factors as the graph takes them: the trained B times s."""
        scaled = {
            name: value * np.float32(self.scale)
            for name, value in self._factors.items()
            if name.startswith(f"{TRAINED}/") and not _is_a(name)
        }
        return {**self._factors, **scaled}

    def _small(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches of no more rows than training takes: less of them would free nothing."""
        for batch in batches:
            for start in range(0, len(batch.ids), self._micro_batch):
                rows = slice(start, start + self._micro_batch)
                yield Batch(
                    batch.ids[rows], batch.labels[rows], batch.positions[rows], batch.segments[rows]
                )

    # -- the factors -----------------------------------------------------------------------------

    def _put(self, part: str, adapter: Adapter | None, scale: float) -> dict[str, int]:
        """Take the factors of a part, B times `scale`; return the ranks that are not 0.

        A module without directions has one that is zero.
        """
        ranks = {}
        for name, (d_out, d_in) in self.shapes.items():
            factors = adapter.layers.get(name) if adapter is not None else None
            if factors is not None and factors.rank:
                ranks[name] = factors.rank
                a, b = np.array(factors.a, np.float32), np.array(factors.b, np.float32, order="C")
                b *= np.float32(scale)
            else:
                a, b = np.zeros((1, d_in), np.float32), np.zeros((d_out, 1), np.float32)
            self._factors[factor_name(part, name, "a")] = np.ascontiguousarray(a)
            self._factors[factor_name(part, name, "b")] = b
        return ranks

    def _trained(self, factors: Trained) -> Arrays:
        """Return the arrays that are trained: A, B or both of modules with directions."""
        names = [
            factor_name(TRAINED, module, factor)
            for module in self._ranks
            for factor in FACTORS
            if factors in ("both", factor.upper())
        ]
        return {name: self._factors[name] for name in names}


def _is_a(name: str) -> bool:
    return name.endswith("/a")


def _top(logits: FloatArray, count: int) -> tuple[NDArray[np.uint32], FloatArray]:
    """Return indices and values (n, k) of the largest logits of each row, falling."""
    count = min(count, logits.shape[-1])
    some = np.argpartition(-logits, count - 1, axis=-1)[:, :count]
    order = np.argsort(-np.take_along_axis(logits, some, -1), axis=-1, kind="stable")
    index = np.take_along_axis(some, order, -1)
    return index.astype(np.uint32), np.take_along_axis(logits, index, -1)
