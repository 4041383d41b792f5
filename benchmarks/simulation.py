"""A fleet in one process: the trainer, the device's algorithm and the merge rules, no network.

What a replay does round by round, without processes, a broker or memory plans, so that rules and
settings can be compared over many seeds. Devices and the aggregator round their numbers as they
would on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from aggregator.merge import RoundView, Update, merge
from benchmarks.folding import FoldingTrainer
from edge_client.data import (
    BatchStream,
    Splits,
    evaluation_batches,
    label_histogram,
    pack,
    step_sample,
    tokenize,
)
from edge_client.learning import learn, learning_rate
from edge_client.memory import Optimizer
from edge_client.mixing import WEIGHTS, first_private, stacked
from edge_client.model import load_tokenizer
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.update import asked_metrics
from protocol.adapter import (
    Adapter,
    Factors,
    add,
    initial_adapter,
    select,
)
from protocol.factors import Trained, trained_factors
from protocol.messages import BaseModelInfo, Job, Training
from protocol.metrics import LOSS_BEFORE, TOKEN_BUCKETS, asked_for
from protocol.tensors import round_trip

NOTHING = Adapter({}, 1.0)
OnRound = Callable[[int, Adapter], None]
OnView = Callable[[RoundView], RoundView]
"""Given a round as the rule is to see it: return what it sees."""


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """One device: its rank, the most directions it holds, and its text."""

    name: str
    rank: int
    held: int
    splits: Splits
    blocks: int = 0
    """The last so many are trained; 0: all."""
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a private adapter comes to: its weight, and losses of the mixture."""

    weight: float
    trust: float
    held_out: float


@dataclass(frozen=True, slots=True)
class Setting:
    """How devices train, and how many rows a loss is measured on."""

    max_tokens: int = 256
    micro_batch: int = 1
    most_rows: Mapping[str, int] = field(default_factory=dict)
    """By split; all rows of a split that is not named."""


class Simulation:
    """Hold one base model and the rows of a fleet's devices."""

    def __init__(
        self,
        model: Path,
        devices: Sequence[SimulatedDevice],
        *,
        seed: int,
        setting: Setting | None = None,
    ) -> None:
        self.folder, self.devices = model, devices
        self.seed = seed
        self.setting = setting = setting or Setting()
        self.trainer = FoldingTrainer(model, threads=1)
        tokens = setting.max_tokens
        self._plan = Plan(1, 1, setting.micro_batch, tokens, False, "f32", 1, 0.0, 0.0)
        tokenizer = load_tokenizer(model)
        self._rows: dict[str, dict[str, Any]] = {}
        for device in devices:
            self._rows[device.name] = {
                name: pack(
                    tokenize(getattr(device.splits, name), tokenizer, max_tokens=tokens),
                    tokens,
                    seed=seed,
                )
                for name in ("train", "trust", "held_out")
            }

    def job(self, **settings: Any) -> Job:
        """Return a job for the simulated base."""
        base = BaseModelInfo(
            name="simulated", sha256="0" * 64, parameters=1, modules=dict(self.trainer.shapes)
        )
        # Rotating directions are drawn from the job's name.
        name = f"simulation-{self.seed}"
        fields = {"job": name, "base": base, "scale": 2.0, "seed": self.seed, **settings}
        return Job.model_validate(fields)

    def with_rank(self, rank: int, *, held: int = 0) -> list[SimulatedDevice]:
        """Return the devices as if all could train `rank` directions, of so many that they hold."""
        return [replace(device, rank=rank, held=max(rank, held)) for device in self.devices]

    def of(self, devices: Sequence[SimulatedDevice]) -> Simulation:
        """Return the same fleet with other ranks and the like."""
        other = copy(self)
        other.devices = devices
        return other

    # ---- losses, nats a token ---------------------------------------------------------------

    def evaluate(self, adapter: Adapter | None, split: str = "held_out") -> dict[str, float]:
        """Return the loss of one adapter on every device's split."""
        self.trainer.load(NOTHING, adapter, self._plan)
        return {device.name: self._loss(device, split) for device in self.devices}

    def loss(self, adapter: Adapter, device: SimulatedDevice, split: str = "held_out") -> float:
        """Return the loss of an adapter on one device's split."""
        self.trainer.load(NOTHING, adapter, self._plan)
        return self._loss(device, split)

    def losses(self, adapter: Adapter | None) -> tuple[float, float]:
        """Return the mean loss over devices on the trust and on the held-out split."""
        trust, held_out = self.evaluate(adapter, "trust"), self.evaluate(adapter)
        return fmean(trust.values()), fmean(held_out.values())

    def batches(self, device: SimulatedDevice, split: str) -> list[Any]:
        """Return the batches on which a loss is measured."""
        rows = self._rows[device.name][split][: self.setting.most_rows.get(split)]
        return list(evaluation_batches(rows, max(4, self.setting.micro_batch)))

    def _loss_of(self, batches: Sequence[Any], trained: Adapter, frozen: Adapter | None) -> float:
        self.trainer.load(trained, frozen, self._plan)
        return self.trainer.evaluate(batches)

    def _loss(self, device: SimulatedDevice, split: str) -> float:
        return self.trainer.evaluate(self.batches(device, split))

    # ---- training ---------------------------------------------------------------------------

    def federated(
        self,
        job: Job,
        *,
        devices: Sequence[SimulatedDevice] | None = None,
        on_round: OnRound | None = None,
        on_view: OnView = lambda view: view,
    ) -> Adapter:
        """Run a job to its end; return the shared adapter."""
        fleet = self.devices if devices is None else devices
        streams = {d.name: self.stream(d) for d in fleet}
        ranks = {d.name: d.rank for d in fleet}
        shared = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        memory = None
        for number in range(1, job.rounds + 1):
            updates = []
            for device in fleet:
                update, ranks[device.name] = self.round(
                    job, device, ranks[device.name], shared, number, streams[device.name]
                )
                updates.append(update)
            trained = trained_factors(job.training.factors, number)
            view = RoundView(
                shared, updates, job.base.modules, job.rank, job.seed + number, trained=trained
            )
            if memory is not None:
                view = replace(view, memory=memory)
            merged = merge(job.rule, on_view(view), settings=job.rule_settings)
            shared, memory = rounded(merged.adapter, job), merged.memory
            if on_round:
                on_round(number, shared)
        return shared

    def mixed(
        self,
        job: Job,
        device: SimulatedDevice,
        rank: int,
        versions: Sequence[Adapter],
        steps: int,
    ) -> Mixed:
        """Give a device a private adapter, and mix it with the shared one as it does best.

        It trains `steps` beside each of the shared adapters in turn, and is mixed with the last.
        """
        settings = job.training.model_copy(update={"steps": steps})
        private, stream = first_private(job, device.name, rank), self.stream(device)
        for shared in versions:
            private, _ = self._train(job, private, shared, stream, settings, False)

        def loss(weight: float, split: str) -> float:
            return self.loss(stacked(versions[-1], private, weight), device, split)

        trust, weight = min((loss(weight, "trust"), weight) for weight in WEIGHTS)
        return Mixed(weight, trust, loss(weight, "held_out"))

    def alone(
        self,
        job: Job,
        device: SimulatedDevice,
        on_stage: Callable[[Adapter], None] | None = None,
    ) -> Adapter:
        """Train one device by itself with the whole job's budget, in one go.

        `on_stage` sees what it has come to each time it has trained as much as a round does.
        """
        settings = job.training.model_copy(update={"steps": job.training.steps * job.rounds})
        start = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        start = start.truncated(device.rank)

        def on_step(step: int, loss: float) -> None:
            if on_stage and step % job.training.steps == 0:
                on_stage(self.trainer.adapter())

        stream = self.stream(device)
        return self._train(
            job, start, None, stream, settings, False, on_step=on_step, optimizer=device.optimizer
        )[0]

    def pooled(self, job: Job) -> Adapter:
        """Train one adapter of full rank on all devices' text, as if it lay in one place.

        No fleet can do that: it is what one shared adapter may come to with so many tokens.
        """
        everything = [row for device in self.devices for row in self._rows[device.name]["train"]]
        steps, devices = job.training.steps * job.rounds, len(self.devices)
        tokens = job.training.tokens_per_step * devices
        settings = job.training.model_copy(update={"steps": steps, "tokens_per_step": tokens})
        start = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)
        stream = BatchStream(everything, self.setting.micro_batch, seed=self.seed)
        return self._train(job, start, None, stream, settings, False)[0]

    def stream(self, device: SimulatedDevice) -> BatchStream:
        """Return a device's training text from its start."""
        rows = self._rows[device.name]["train"]
        return BatchStream(rows, self._micro_batch(device), seed=self.seed)

    def _micro_batch(self, device: SimulatedDevice) -> int:
        """Return the rows that a device trains at a time.

        Who has no memory for Adam's moments has none for several rows.
        """
        return self.setting.micro_batch if device.optimizer == "adamw" else 1

    def round(
        self,
        job: Job,
        device: SimulatedDevice,
        rank: int,
        shared: Adapter,
        number: int,
        stream: BatchStream,
    ) -> tuple[Update, int]:
        """Train one device for a round; return its update and the rank it goes on with."""
        held = shared.truncated(max(device.held, rank) if job.remainder == "frozen" else rank)

        rows = self._rows[device.name]["train"]
        asked = asked_for(job.rule_settings)
        sampling = LOSS_BEFORE in asked
        sample = list(evaluation_batches(step_sample(rows, job.training.tokens_per_step), 4))

        def train(received: Adapter, frozen: Adapter | None) -> tuple[Adapter, TrainReport]:
            factors = trained_factors(job.training.factors, number)
            before = self._loss_of(sample, received, frozen) if sampling else 0.0
            trained, report = self._train(
                job,
                received,
                frozen,
                stream,
                job.training,
                True,
                factors,
                round_number=number,
                optimizer=device.optimizer,
            )
            if sampling:
                losses = (before, self.trainer.evaluate(sample))
                report = replace(report, sample_losses=losses)
            return trained, report

        learned = learn(job, device.name, held, rank, number, train, blocks=device.blocks)
        absolute = add(select(shared, learned.directions), rounded(learned.change, job))
        histogram = label_histogram(rows) if TOKEN_BUCKETS[0] in asked else ()
        metrics = asked_metrics(job, learned.report, histogram)
        examples = learned.report.tokens
        return Update(device.name, absolute, learned.directions, examples, metrics), learned.rank

    def _train(
        self,
        job: Job,
        trained: Adapter,
        frozen: Adapter | None,
        stream: BatchStream,
        settings: Training,
        prune: bool,
        factors: Trained = "both",
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        round_number: int = 1,
        optimizer: Optimizer = "adamw",
    ) -> tuple[Adapter, TrainReport]:
        self.trainer.load(trained, frozen, replace(self._plan, optimizer=optimizer))
        report = self.trainer.train(
            stream,
            settings=settings,
            learning_rate=learning_rate(job, trained.rank, round_number),
            pruning=job.pruning if prune else None,
            on_step=on_step,
            factors=factors,
        )
        return self.trainer.adapter(), report


def rounded(adapter: Adapter, job: Job) -> Adapter:
    """Return an adapter as it is after it has travelled."""
    return Adapter(
        {
            name: Factors(
                round_trip(factors.a, job.encoding_up), round_trip(factors.b, job.encoding_up)
            )
            for name, factors in adapter.layers.items()
        },
        adapter.scale,
    )
