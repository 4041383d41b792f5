"""Personal adapters over the anchored form, simulated.

Device i holds a full adapter H_i of rank R. Each round it trains r_i directions of it with the
rest frozen; full_j is what device j then has. Then H_i⁺ is the best rank-R form of Σ_j w_ij·full_j
with w_i = softmax(score_ij / T_i) (aggregator.merge.trust; arXiv 2404.09753).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
import torch

from aggregator.merge import RoundView, Update
from aggregator.merge.lowrank import gram
from aggregator.merge.round_view import completed
from aggregator.merge.sums import Float64Array
from aggregator.merge.trust import (
    cosine_scores,
    personal,
    prediction_distance,
    prediction_scores,
    softmax_rows,
    validation_scores,
)
from benchmarks.simulation import Simulation, rounded
from edge_client.data import Batch
from edge_client.trainer.torch_trainer import attention_mask
from protocol.adapter import Adapter, initial_adapter
from protocol.messages import Job
from protocol.probe import TopLogits

TOP_LOGITS = 100
FINISH = (1.0, 0.5, 0.25, 0.125)
"""Parts of the temperature."""
PROBE_ROWS = 4
"""Rows of the public probe: here one of the trust split of every second device."""


@dataclass(frozen=True, slots=True)
class Trust:
    """How devices weigh each other.

    `stale` scores validation by the adapters of the round before, as devices that have not seen
    this round's can, instead of this round's own. `adapt` lets every device move its temperature
    by factors of two to where the merged adapter does better on its trust split. `finish` lets it
    choose the temperature of the last merge alone, out of those of `FINISH`: what is best to use is
    sharper than what is best to train on from. For the same reason `patience` prefers the flatter
    of two temperatures unless the sharper is better by more than that part of the loss.
    """

    strategy: Literal["weights", "validation", "predictions"]
    temperature: float
    stale: bool = False
    adapt: bool = False
    finish: bool = False
    patience: float = 0.0


class PersonalRun:
    """Run a job in which every device has an adapter of its own."""

    def __init__(self, fleet: Simulation, job: Job, trust: Trust) -> None:
        self._fleet, self._job, self._trust = fleet, job, trust
        first = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        self.held = [first for _ in fleet.devices]
        self._streams = [fleet.stream(d) for d in fleet.devices]
        self.temperatures = np.full(len(fleet.devices), trust.temperature)
        self._last_losses = np.zeros((len(fleet.devices), len(fleet.devices)))

    def run(self, on_round: Callable[[int, float], None]) -> None:
        """Run to the end; `on_round` sees the mean loss of own adapters on the trust splits."""
        for number in range(1, self._job.rounds + 1):
            full = [self._trained(k, number) for k in range(len(self.held))]
            view = RoundView(
                self.held[0], full, self._job.base.modules, self._job.rank, self._job.seed + number
            )
            scores = self._scores([update.adapter for update in full])
            if self._trust.finish and number == self._job.rounds:
                self._choose(view, scores, FINISH, 0.0)
            elif self._trust.adapt:
                neighbour = 2.0 if number % 2 else 0.5
                self._choose(view, scores, (1.0, neighbour), self._trust.patience)
            else:
                self.held = self._merged(view, scores, self.temperatures)
            on_round(number, self.loss("trust"))

    def loss(self, split: str) -> float:
        """Return the mean loss over devices of each one's own adapter."""
        return fmean(self.own_losses(split).values())

    def own_losses(self, split: str) -> dict[str, float]:
        """Return each device's loss with its own adapter."""
        pairs = zip(self._fleet.devices, self.held, strict=True)
        return {d.name: self._fleet.loss(adapter, d, split) for d, adapter in pairs}

    def _trained(self, k: int, number: int) -> Update:
        device, held = self._fleet.devices[k], self.held[k]
        update, _ = self._fleet.round(
            self._job, device, device.rank, held, number, self._streams[k]
        )
        return completed(update, held)

    def _scores(self, adapters: list[Adapter]) -> Float64Array:
        if self._trust.strategy == "weights":
            return cosine_scores(gram(adapters))
        if self._trust.strategy == "predictions":
            return prediction_scores(prediction_distance([self._probe(a) for a in adapters]))
        columns = [list(self._fleet.evaluate(a, "trust").values()) for a in adapters]
        losses = np.array(columns).T  # [i, j]: adapter j on the text of device i
        used = self._last_losses if self._trust.stale else losses
        self._last_losses = losses - np.diag(losses)[:, None]
        return validation_scores(used)

    def _merged(
        self, view: RoundView, scores: Float64Array, temperatures: Float64Array
    ) -> list[Adapter]:
        rows = softmax_rows(scores / temperatures[:, None])
        return [rounded(adapter, self._job) for adapter in personal(view, rows)]

    def _choose(
        self, view: RoundView, scores: Float64Array, factors: tuple[float, ...], patience: float
    ) -> None:
        """Merge at several temperatures; each device takes the one best on its trust split.

        That is the flattest whose loss is no more than the part `patience` above the least.
        """
        temperatures = [self.temperatures * factor for factor in sorted(factors, reverse=True)]
        choices = [self._merged(view, scores, t) for t in temperatures]
        for k, device in enumerate(self._fleet.devices):
            losses = [self._fleet.loss(choice[k], device, "trust") for choice in choices]
            best = int(np.argmax(np.array(losses) <= (1 + patience) * min(losses)))  # the first
            self.held[k] = choices[best][k]
            self.temperatures[k] = temperatures[best][k]

    @torch.no_grad()
    def _probe(self, adapter: Adapter) -> TopLogits:
        """Return an adapter's largest logits on the public probe."""
        self._fleet.loss(adapter, self._fleet.devices[0], "trust")  # loads it
        model = self._fleet.trainer.model
        found = []
        for batch in self._probe_batches():
            logits = model(
                input_ids=torch.from_numpy(batch.ids),
                position_ids=torch.from_numpy(batch.positions),
                attention_mask=attention_mask(batch, model.dtype),
            ).logits.flatten(0, 1)
            found.append(logits[torch.from_numpy(batch.labels).flatten() >= 0])
        top = torch.cat(found).float().topk(min(TOP_LOGITS, found[0].shape[1]), dim=1)
        return TopLogits(top.indices.numpy(), top.values.numpy())

    def _probe_batches(self) -> list[Batch]:
        devices = self._fleet.devices[:: max(1, len(self._fleet.devices) // PROBE_ROWS)]
        return [_first_row(self._fleet.batches(d, "trust")[0]) for d in devices]


def _first_row(batch: Batch) -> Batch:
    return Batch(batch.ids[:1], batch.labels[:1], batch.positions[:1], batch.segments[:1])
