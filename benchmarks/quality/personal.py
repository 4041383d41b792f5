"""Personal adapters as the aggregator makes them, without a network: `aggregator.personal`.

Devices do what `edge_client` does: each measures on its trust split what it was given with a
version, trains, and at the end keeps what does best there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean

import torch

from aggregator.merge import Memory, RoundView, Update
from aggregator.merge.round_view import completed
from aggregator.personal.answers import Answer
from aggregator.personal.mixing import PersonalRound, personal_round
from aggregator.personal.settings import Strategy, read_trust_settings
from aggregator.personal.state import TrustState
from benchmarks.simulation import SimulatedDevice, Simulation, rounded
from edge_client.data import Batch
from edge_client.own_changes import best_share, summed
from edge_client.trainer.torch_trainer import attention_mask
from protocol.adapter import Adapter, initial_adapter
from protocol.messages import Job
from protocol.probe import TopLogits

TOP_LOGITS = 100
PROBE_ROWS = 4
"""Rows of the public probe: here one of the trust split of every second device."""


class PersonalRun:
    """Run a job in which every device has an adapter of its own."""

    def __init__(self, fleet: Simulation, job: Job, strategy: Strategy) -> None:
        self._fleet, self._job, self._strategy = fleet, job, strategy
        self._settings = read_trust_settings(job.rule_settings)
        self._common = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        self.held = {device.name: self._common for device in fleet.devices}
        self._streams = {device.name: fleet.stream(device) for device in fleet.devices}
        self._given: PersonalRound | None = None
        self._own: dict[str, float] = {}
        """Loss of each device's adapter at the end of its last training."""
        self._state = TrustState()
        self._changes: dict[str, Adapter] = {}
        """What each device's own training has changed so far."""
        self.shares: dict[str, float] = {}
        """How much of it each device ends with besides."""

    @property
    def temperatures(self) -> dict[str, float]:
        """How sharply each device trusted in the last round."""
        return self._given.temperatures if self._given else {}

    def run(self, on_round: Callable[[int, float], None]) -> None:
        """Run to the end; `on_round` sees the mean loss of own adapters on the trust splits."""
        for number in range(1, self._job.rounds + 1):
            answers = {d.name: self._answer(d, self._given) for d in self._fleet.devices}
            full = [self._trained(device, number) for device in self._fleet.devices]
            seed = self._job.seed + number
            shapes, rank = self._job.base.modules, self._job.rank
            memory = self._given.common.memory if self._given else Memory()
            view = RoundView(self._common, full, shapes, rank, seed, memory)
            self._given = personal_round(
                self._strategy,
                view,
                answers,
                self._probes(full),
                self._state,
                self._settings,
                version=number,
                last=number == self._job.rounds,
            )
            self._state = self._given.state
            self._common = rounded(self._given.common.adapter, self._job)
            for name in self.held:
                mixture = self._given.mixtures.get(name)
                self.held[name] = rounded(mixture, self._job) if mixture else self._common
            if number == self._job.rounds:
                self._settle(self._given)
            on_round(number, fmean(self.own_losses("trust").values()))

    def own_losses(self, split: str) -> dict[str, float]:
        """Return each device's loss with its own adapter."""
        return {d.name: self._fleet.loss(self.held[d.name], d, split) for d in self._fleet.devices}

    def _answer(self, device: SimulatedDevice, given: PersonalRound | None) -> Answer:
        """Return what a device has found of what it was given."""

        def loss(adapter: Adapter) -> float:
            return self._fleet.loss(rounded(adapter, self._job), device, "trust")

        received = self._fleet.loss(self.held[device.name], device, "trust")
        if given is None:
            return Answer(received)
        trial = given.trials.get(device.name)
        return Answer(
            received,
            self._own[device.name],
            loss(trial) if trial else None,
            {name: loss(adapter) for name, adapter in given.candidates.items()},
        )

    def _trained(self, device: SimulatedDevice, number: int) -> Update:
        held = self.held[device.name]
        stream = self._streams[device.name]
        update, _ = self._fleet.round(self._job, device, device.rank, held, number, stream)
        full = completed(update, held)
        before = self._changes.get(device.name)
        self._changes[device.name] = summed(before, full.adapter, held, self._job)
        self._own[device.name] = self._fleet.loss(full.adapter, device, "trust")
        return full

    def _settle(self, given: PersonalRound) -> None:
        """Let each device end with its own, the same at a sharper temperature, or the common one.

        And with what more of its own changes helps.
        """
        for device in self._fleet.devices:
            name, loss = device.name, partial(self._fleet.loss, device=device, split="trust")
            sharper = given.trials.get(name)
            choices = [self.held[name], self._common]
            choices += [rounded(sharper, self._job)] if sharper else []
            chosen = min(choices, key=loss)
            self.held[name], self.shares[name] = best_share(
                loss, chosen, self._changes[name], self._job
            )

    @torch.no_grad()
    def _probes(self, full: list[Update]) -> dict[str, TopLogits]:
        """Return the largest logits of full adapters on the public probe, where they are needed."""
        if self._strategy != "trust-predictions":
            return {}
        model = self._fleet.trainer.model
        found = {}
        for update in full:
            self._fleet.loss(update.adapter, self._fleet.devices[0], "trust")  # loads it
            told = []
            for batch in self._probe_batches():
                logits = model(
                    input_ids=torch.from_numpy(batch.ids),
                    position_ids=torch.from_numpy(batch.positions),
                    attention_mask=attention_mask(batch, model.dtype),
                ).logits.flatten(0, 1)
                told.append(logits[torch.from_numpy(batch.labels).flatten() >= 0])
            top = torch.cat(told).float().topk(min(TOP_LOGITS, told[0].shape[1]), dim=1)
            found[update.device] = TopLogits(top.indices.numpy(), top.values.numpy())
        return found

    def _probe_batches(self) -> list[Batch]:
        devices = self._fleet.devices[:: max(1, len(self._fleet.devices) // PROBE_ROWS)]
        return [_first_row(self._fleet.batches(d, "trust")[0]) for d in devices]


def _first_row(batch: Batch) -> Batch:
    return Batch(batch.ids[:1], batch.labels[:1], batch.positions[:1], batch.segments[:1])
