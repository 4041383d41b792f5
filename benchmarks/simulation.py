"""A fleet in one process: the trainer, the device's algorithm and the merge rules, no network.

What a replay does round by round, without processes, a broker or memory plans, so that rules and
settings can be compared over many seeds. Devices and the aggregator round their numbers as they
would on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from aggregator.merge import RoundView, Update, merge
from edge_client.data import (
    BatchStream,
    evaluation_batches,
    pack,
    read_examples,
    split_examples,
    tokenize,
)
from edge_client.learner import learn, learning_rate
from edge_client.mixing import WEIGHTS, first_private, stacked
from edge_client.model import load_tokenizer
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.torch_trainer import TorchTrainer
from protocol.adapter import (
    Adapter,
    Factors,
    add,
    initial_adapter,
    module_directions,
    select,
)
from protocol.factors import Trained, trained_factors
from protocol.layers import last_blocks, only
from protocol.messages import BaseModelInfo, Job, Training
from protocol.tensors import round_trip

NOTHING = Adapter({}, 1.0)


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """One device: its rank and its text."""

    name: str
    rank: int
    held: int
    data: tuple[Path, ...]
    blocks: int = 0
    """The last so many are trained; 0: all."""


class Simulation:
    """Hold one base model and the rows of a fleet's devices."""

    def __init__(
        self, model: Path, devices: Sequence[SimulatedDevice], *, seed: int, max_tokens: int = 256
    ) -> None:
        self.devices = devices
        self._seed = seed
        self._trainer = TorchTrainer(model, dtype="bf16", threads=1)
        self._plan = Plan(1, 1, 1, max_tokens, False, "bf16", 1, 0.0, 0.0)
        tokenizer = load_tokenizer(model)
        self._rows: dict[str, dict[str, Any]] = {}
        for device in devices:
            splits = split_examples(read_examples(device.data).examples, seed=seed)
            self._rows[device.name] = {
                name: pack(
                    tokenize(getattr(splits, name), tokenizer, max_tokens=max_tokens),
                    max_tokens,
                    seed=seed,
                )
                for name in ("train", "trust", "held_out")
            }

    def job(self, **settings: Any) -> Job:
        """Return a job for the simulated base."""
        base = BaseModelInfo(
            name="simulated", sha256="0" * 64, parameters=1, modules=dict(self._trainer.shapes)
        )
        fields = {"job": "simulation", "base": base, "scale": 2.0, "seed": self._seed, **settings}
        return Job.model_validate(fields)

    def evaluate(self, adapter: Adapter | None, split: str = "held_out") -> dict[str, float]:
        """Return the loss of every device on a split, nats a token."""
        self._trainer.load(NOTHING, adapter, self._plan)
        return {device.name: self._loss(device, split) for device in self.devices}

    def losses(self, adapter: Adapter | None) -> tuple[float, float]:
        """Return the mean loss over devices on the trust and on the held-out split."""
        trust, held_out = self.evaluate(adapter, "trust"), self.evaluate(adapter)
        return fmean(trust.values()), fmean(held_out.values())

    def federated(self, job: Job) -> Adapter:
        """Run a job to its end; return the shared adapter."""
        *_, last = self.versions(job)
        return last

    def versions(self, job: Job) -> Iterator[Adapter]:
        """Run a job; yield the shared adapter as each round leaves it."""
        streams = {d.name: self._stream(d) for d in self.devices}
        ranks = {d.name: d.rank for d in self.devices}
        shared = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        for number in range(1, job.rounds + 1):
            updates = []
            for device in self.devices:
                update, ranks[device.name] = self._round(
                    job, device, ranks[device.name], shared, number, streams[device.name]
                )
                updates.append(update)
            view = RoundView(
                shared,
                updates,
                job.base.modules,
                job.rank,
                job.seed + number,
                trained=trained_factors(job.training.factors, number),
            )
            shared = _rounded(merge(job.rule, view, settings=job.rule_settings).adapter, job)
            yield shared

    def mixed(
        self, job: Job, rank: int, versions: Sequence[Adapter], steps: int
    ) -> dict[str, tuple[float, float]]:
        """Return each device's mixing weight, and its held-out loss with a private adapter.

        It trains `steps` beside each of the shared adapters in turn, and is mixed with the last.
        """
        settings = job.training.model_copy(update={"steps": steps})
        found = {}
        for device in self.devices:
            private, stream = first_private(job, device.name, rank), self._stream(device)
            for shared in versions:
                private, _ = self._train(job, private, shared, stream, settings, False)

            def loss(weight: float, split: str, of: Adapter = private, d: Any = device) -> float:
                self._trainer.load(NOTHING, stacked(versions[-1], of, weight), self._plan)
                return self._loss(d, split)

            _, weight = min((loss(weight, "trust"), weight) for weight in WEIGHTS)
            found[device.name] = weight, loss(weight, "held_out")
        return found

    def alone(self, job: Job) -> tuple[float, float]:
        """Train every device by itself with the whole job's budget; return `losses` of that."""
        settings = job.training.model_copy(update={"steps": job.training.steps * job.rounds})
        losses = []
        for device in self.devices:
            start = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
            start = start.truncated(device.rank)
            adapter, _ = self._train(job, start, None, self._stream(device), settings, False)
            self._trainer.load(NOTHING, adapter, self._plan)
            losses.append([self._loss(device, split) for split in ("trust", "held_out")])
        trust, held_out = zip(*losses, strict=True)
        return fmean(trust), fmean(held_out)

    def pooled(self, job: Job) -> Adapter:
        """Train one adapter of full rank on all devices' text, as if it lay in one place.

        No fleet can do that: it is what one shared adapter may come to with so many tokens.
        """
        everything = [row for device in self.devices for row in self._rows[device.name]["train"]]
        steps, devices = job.training.steps * job.rounds, len(self.devices)
        tokens = job.training.tokens_per_step * devices
        settings = job.training.model_copy(update={"steps": steps, "tokens_per_step": tokens})
        start = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        stream = BatchStream(everything, 1, seed=self._seed)
        return self._train(job, start, None, stream, settings, False)[0]

    def _loss(self, device: SimulatedDevice, split: str) -> float:
        return self._trainer.evaluate(evaluation_batches(self._rows[device.name][split], 4))

    def _stream(self, device: SimulatedDevice) -> BatchStream:
        return BatchStream(self._rows[device.name]["train"], 1, seed=self._seed)

    def _round(
        self,
        job: Job,
        device: SimulatedDevice,
        rank: int,
        shared: Adapter,
        number: int,
        stream: BatchStream,
    ) -> tuple[Update, int]:
        held = shared.truncated(max(device.held, rank) if job.remainder == "frozen" else rank)

        def train(received: Adapter, frozen: Adapter | None) -> tuple[Adapter, TrainReport]:
            factors = trained_factors(job.training.factors, number)
            return self._train(job, received, frozen, stream, job.training, True, factors)

        learned = learn(job, device.name, held, rank, number, train, blocks=device.blocks)
        directions = module_directions(
            job.base.modules,
            job.directions,
            job=job.job,
            device=device.name,
            round_number=number,
            rank_trained=learned.rank_trained,
            held=learned.held,
            rank=learned.rank,
        )
        directions = only(directions, last_blocks(job.base.modules, device.blocks))
        absolute = add(select(shared, directions), _rounded(learned.change, job))
        examples = learned.report.tokens
        return Update(device.name, absolute, dict(directions), examples, {}), learned.rank

    def _train(
        self,
        job: Job,
        trained: Adapter,
        frozen: Adapter | None,
        stream: BatchStream,
        settings: Training,
        prune: bool,
        factors: Trained = "both",
    ) -> tuple[Adapter, TrainReport]:
        self._trainer.load(trained, frozen, self._plan)
        report = self._trainer.train(
            stream,
            settings=settings,
            learning_rate=learning_rate(job, trained.rank),
            pruning=job.pruning if prune else None,
            on_step=lambda step, loss: None,
            factors=factors,
        )
        return self._trainer.adapter(), report


def _rounded(adapter: Adapter, job: Job) -> Adapter:
    return Adapter(
        {
            name: Factors(
                round_trip(factors.a, job.encoding_up), round_trip(factors.b, job.encoding_up)
            )
            for name, factors in adapter.layers.items()
        },
        adapter.scale,
    )
