"""The arms that are compared: each a function of a fleet and a learning rate.

All arms see the same devices, the same text, the same number of steps and tokens, and start from
the same adapter. `PUBLISHED` is what a rule of a paper goes with: a device cuts the shared adapter
to its own rank, trains the top directions and has one learning rate whatever its rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

from benchmarks.quality.datasets import RANKS
from benchmarks.quality.full_weights import FullWeights
from benchmarks.quality.personal import PersonalRun
from benchmarks.simulation import SimulatedDevice, Simulation
from edge_client.memory import Activations, Optimizer, Way, predict_mib
from protocol.adapter import Adapter
from protocol.messages import Job, PersonalRule, Training
from protocol.mistakes import nearest

Kind = Literal["base", "alone", "common", "personal", "full weights"]
Fields = Mapping[str, Any]
LADDER = (2, 4, 8, 16)
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""Learning rates that an arm may have."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much every device trains."""

    rounds: int = 10
    steps: int = 8
    tokens_per_step: int = 256
    max_tokens: int = 128

    @property
    def training(self) -> dict[str, int]:
        """Return it as settings of a job's training."""
        return {
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to; losses are nats a token, `curve` is on the trust splits by round."""

    trust: float
    held_out: float
    devices: dict[str, float]
    """Held-out loss of each device."""
    curve: list[float]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing to compare: how it merges, and how its devices train.

    `rank` is that of every device, and of the shared adapter; `trained` is how many of the
    directions that there are each device trains. None leaves each its own. Personal arms have a
    `strategy`, or the common adapter where it is None; with `private` each device then trains a
    private adapter of its own rank beside it, with as many steps as it had, and mixes the two.
    With `fits` a device's rank says how much memory it has; see `fitting`.
    `start` is the learning rate at which the search for the arm's best begins, if it is `searched`.
    """

    kind: Kind
    job: Fields = field(default_factory=dict)
    training: Fields = field(default_factory=dict)
    rank: int | None = None
    trained: int | None = None
    strategy: PersonalRule | None = None
    private: bool = False
    fits: bool = False
    start: float = 8e-3
    searched: bool = True

    @property
    def steps(self) -> Literal["as many", "twice as many"]:
        """How much its devices train, next to the other arms."""
        return "twice as many" if self.private or "steps" in self.training else "as many"

    @property
    def is_usual(self) -> bool:
        """Whether its devices have the fleet's ranks, and one rate in all rounds, as personal ones.

        The others say what ranks and rates do, not which rule is best.
        """
        falls = "learning_rate_last" in self.training
        return self.rank is None and self.trained is None and not falls

    def run(self, fleet: Simulation, schedule: Schedule, rate: float) -> Result:
        """Run the arm on a fleet."""
        started = time.monotonic()
        job = self.whole_job(fleet, schedule, rate)
        found = _RUNS[self.kind](self, self.of_fleet(fleet, job), job)
        trust, devices, curve, details = found
        held_out = fmean(devices.values())
        seconds = time.monotonic() - started
        return Result(trust, held_out, devices, curve, seconds, details)

    def of_fleet(self, fleet: Simulation, job: Job) -> Simulation:
        """Return the fleet as the arm has it."""
        return fleet.of([fitting(d, job) for d in fleet.devices]) if self.fits else fleet

    def whole_job(self, fleet: Simulation, schedule: Schedule, rate: float) -> Job:
        """Return the job that the arm runs."""
        ladder = [r for r in LADDER if self.rank is None or r <= self.rank]
        training = {"learning_rate_by_rank": False, **schedule.training, **self.training}
        fields = {"pruning": {"enabled": False}, **PUBLISHED, **self.job}
        return fleet.job(
            ladder=ladder,
            rounds=schedule.rounds,
            training={**training, "learning_rate": rate},
            **fields,
        )


def fitting(device: SimulatedDevice, job: Job) -> SimulatedDevice:
    """Return a device as `optimizer = "fit"` has it: with the largest rank that its memory holds.

    Its memory is what AdamW takes to train its rank beside all that it holds, as the planner
    reckons it where memory is short: with checkpointing, in micro-batches.
    """

    def mib(rank: int, optimizer: Optimizer) -> float:
        return predict_mib(
            job.base.modules,
            weights_mib=0.0,
            activations=Activations(0.0, 0.0),
            way=Way("f32", checkpointing=True),
            rank=rank,
            held=device.held,
            tokens=0,
            accumulates=True,
            optimizer=optimizer,
        )

    has_mib = mib(device.rank, "adamw")
    rank = max(r for r in job.ladder if r <= device.rank or mib(r, "adafactor") <= has_mib)
    return device if rank == device.rank else replace(device, rank=rank, optimizer="adafactor")


Found = tuple[float, dict[str, float], list[float], dict[str, Any]]


def _base(arm: Arm, fleet: Simulation, job: Job) -> Found:
    return fmean(fleet.evaluate(None, "trust").values()), fleet.evaluate(None), [], {}


def _common(arm: Arm, fleet: Simulation, job: Job) -> Found:
    adapter, curve = _shared(arm, fleet, job)
    return curve[-1], fleet.evaluate(adapter), curve, {}


def _shared(arm: Arm, fleet: Simulation, job: Job) -> tuple[Adapter, list[float]]:
    curve: list[float] = []
    devices = None if arm.rank is None else fleet.with_rank(arm.rank)
    if arm.trained is not None:
        devices = fleet.with_rank(arm.trained, held=job.rank)
    adapter = fleet.federated(
        job,
        devices=devices,
        on_round=lambda _, shared: curve.append(fmean(fleet.evaluate(shared, "trust").values())),
    )
    return adapter, curve


def _alone(arm: Arm, fleet: Simulation, job: Job) -> Found:
    """Train each device by itself; where it overfits it keeps its best by the trust split."""
    held_out: dict[str, float] = {}
    at_end: list[float] = []
    curves, kept = [], []
    for device in fleet.devices:
        stages: list[Adapter] = []
        fleet.alone(job, device, stages.append)
        curve = [fleet.loss(adapter, device, "trust") for adapter in stages]
        best = min(range(len(curve)), key=curve.__getitem__)
        held_out[device.name] = fleet.loss(stages[best], device)
        at_end.append(fleet.loss(stages[-1], device))
        curves.append(curve)
        kept.append(best)
    trust = fmean(curve[best] for curve, best in zip(curves, kept, strict=True))
    means = [fmean(column) for column in zip(*curves, strict=True)]
    details = {"stopped_after": [best + 1 for best in kept], "held_out_at_end": fmean(at_end)}
    return trust, held_out, means, details


def _personal(arm: Arm, fleet: Simulation, job: Job) -> Found:
    if arm.strategy:
        curve: list[float] = []
        run = PersonalRun(fleet, job, arm.strategy)
        run.run(lambda _, loss: curve.append(loss))
        held, details = run.held, {"temperatures": run.temperatures, "shares": run.shares}
    else:
        shared, curve = _shared(arm, fleet, job)
        held, details = {device.name: shared for device in fleet.devices}, {}
    if not arm.private:
        held_out = {d.name: fleet.loss(held[d.name], d) for d in fleet.devices}
        return curve[-1], held_out, curve, details
    steps = job.training.steps * job.rounds
    mixed = {d.name: fleet.mixed(job, d, d.rank, [held[d.name]], steps) for d in fleet.devices}
    details["private"] = {name: found.weight for name, found in mixed.items()}
    held_out = {name: found.held_out for name, found in mixed.items()}
    return fmean(found.trust for found in mixed.values()), held_out, curve, details


def _full_weights(arm: Arm, fleet: Simulation, job: Job) -> Found:
    control, curve = FullWeights(fleet), []
    trust, held_out = control.run(
        job, lambda _: curve.append(fmean(control.losses("trust").values()))
    )
    return trust, held_out, curve, {}


_RUNS = {
    "base": _base,
    "alone": _alone,
    "common": _common,
    "personal": _personal,
    "full weights": _full_weights,
}

LEFT: Fields = {"split": "left", "momentum": 0.0}
BALANCED: Fields = {"split": "balanced", "momentum": 0.0}
MOMENTUM: Fields = {"split": "balanced", "momentum": 0.5}
PUBLISHED: Fields = {"remainder": "dropped", "directions": "top", "rule_settings": LEFT}
FROZEN: Fields = {"remainder": "frozen", "directions": "top", "rule_settings": BALANCED}
ROTATING: Fields = {"remainder": "frozen", "directions": "rotating", "rule_settings": BALANCED}
ROTATING_LEFT: Fields = {**ROTATING, "rule_settings": LEFT}
BY_RANK = {"learning_rate_by_rank": True}
FALLING = {"learning_rate_last": 0.1}
A_FASTER = {"learning_rate_a": 4.0}
ADDED: Mapping[str, Fields] = {
    "error feedback": {"error_feedback": True},
    "weights by loss reduction": {"weights": "loss-reduction"},
    "weights by discrepancy": {"weights": "discrepancy"},
}
"""Settings of a rule that are off by default."""
EQUAL = ceil(fmean(RANKS))
"""The rank at which devices that are all alike train about as many directions as the fleet."""
TWICE = {"steps": 2 * Schedule().steps}
"""What devices train that have a private adapter too."""


def _rule(name: str, fields: Fields = PUBLISHED, **others: Any) -> Arm:
    return Arm("common", {"rule": name, **fields}, **others)


def _personal_arm(strategy: PersonalRule | None, fields: Fields = ROTATING, **others: Any) -> Arm:
    rule = strategy or "anchored"
    return Arm("personal", {"rule": rule, **fields}, BY_RANK, strategy=strategy, **others)


def _arms() -> dict[str, Arm]:
    pruning = {"enabled": True, "gamma": 0.99, "penalty": 0.005, "rank_min": 2}
    default = _rule("anchored", ROTATING, training=BY_RANK)
    smallest, largest = min(RANKS), max(RANKS)
    arms = {
        "base": Arm("base"),
        "local only": Arm("alone", training=BY_RANK),
        f"all at rank {smallest}": _rule("anchored", rank=smallest),
        f"all at rank {largest}": _rule("anchored", rank=largest),
        "fedavg": _rule("fedavg"),
        f"fedavg, all at rank {largest}": _rule("fedavg", rank=largest),
        "hetlora": _rule("hetlora", {**PUBLISHED, "pruning": pruning}),
        "flexlora": _rule("flexlora"),
        "segment": _rule("segment"),
        "flora": _rule("flora"),
        "geomed": _rule("geomed", ROTATING, training=BY_RANK),
        "krum": _rule("krum", ROTATING, training=BY_RANK),
        "anchored, dropped": _rule("anchored"),
        "anchored, frozen": _rule("anchored", FROZEN),
        "anchored, frozen, by rank": _rule("anchored", FROZEN, training=BY_RANK),
        "anchored, rotating": _rule("anchored", ROTATING),
        "anchored, rotating, by rank": default,
        FITS: replace(default, fits=True),
        DEFAULT: replace(default, job={**default.job, "rule_settings": MOMENTUM}, fits=True),
        f"all train {EQUAL} of {largest}": _rule(
            "anchored", ROTATING, training=BY_RANK, trained=EQUAL
        ),
        "full weights averaged": Arm("full weights", start=1e-3),
        "trust-weights": _personal_arm("trust-weights"),
        "trust-validation": _personal_arm("trust-validation"),
        "trust-predictions": _personal_arm("trust-predictions"),
        "trust-validation, optimiser that fits": _personal_arm("trust-validation", fits=True),
        PERSONAL: _personal_arm(
            "trust-validation", {**ROTATING, "rule_settings": MOMENTUM}, fits=True
        ),
        "shared and private": _personal_arm(None, private=True),
        "trust-validation and private": _personal_arm("trust-validation", private=True),
        "local only, optimiser that fits": Arm("alone", training=BY_RANK, fits=True),
        "local only, twice the steps": Arm("alone", training={**BY_RANK, **TWICE}, start=2e-3),
        "anchored, rotating, by rank, twice the steps": _rule(
            "anchored", ROTATING, training={**BY_RANK, **TWICE}, start=4e-3
        ),
    }
    arms["anchored, rotating, by rank, rate falls"] = _rule(
        "anchored", ROTATING, training={**BY_RANK, **FALLING}, start=1.6e-2
    )
    arms[f"all at rank {largest}, rate falls"] = _rule("anchored", rank=largest, training=FALLING)
    arms[f"all at rank {largest}, balanced split"] = _rule(
        "anchored", {**PUBLISHED, "rule_settings": BALANCED}, rank=largest
    )
    arms["anchored, rotating, by rank, left split"] = _rule(
        "anchored", ROTATING_LEFT, training=BY_RANK, start=4e-3
    )
    arms["trust-validation, left split"] = _personal_arm(
        "trust-validation", ROTATING_LEFT, start=4e-3
    )
    arms[f"all at rank {largest}, left split, A faster"] = _rule(
        "anchored", rank=largest, training=A_FASTER
    )
    arms["anchored, rotating, by rank, left split, A faster"] = _rule(
        "anchored", ROTATING_LEFT, training={**BY_RANK, **A_FASTER}
    )
    arms[f"{LARGEST}, momentum 0.5"] = _rule(
        "anchored", {**PUBLISHED, "rule_settings": {**LEFT, "momentum": 0.5}}, rank=largest
    )
    for name, settings in ADDED.items():
        arms[f"{FITS}, {name}"] = replace(
            arms[FITS], job={**arms[FITS].job, "rule_settings": {**BALANCED, **settings}}
        )
    arms[UNTOUCHED] = replace(
        arms[DEFAULT],
        job={**arms[DEFAULT].job, "pruning": {"enabled": True}},
        start=Training().learning_rate,
        searched=False,
    )
    return arms


FITS = "anchored, rotating, by rank, optimiser that fits"
DEFAULT = f"{FITS}, momentum 0.5"
"""What a job does by default, without pruning and at the best learning rate."""
UNTOUCHED = "a job's defaults"
"""The same with pruning, and at the learning rate that a job has."""
PERSONAL = "trust-validation, optimiser that fits, momentum 0.5"
LARGEST = f"all at rank {max(RANKS)}"
"""The bound: what no fleet of these devices could run."""
ARMS: Mapping[str, Arm] = MappingProxyType(_arms())


def unknown_arm(name: str) -> str:
    """Return what to say of an arm that there is not: which was meant, and all, one a line.

    Many names begin alike: the beginning of the default's name means the default.
    """
    meant = DEFAULT if DEFAULT.startswith(name) else nearest(name, ARMS)
    asked = f"; did you mean {meant!r}?" if meant else "."
    lines = (f"  {arm!r}{', the default of a job' if arm == DEFAULT else ''}" for arm in ARMS)
    return "\n".join([f"there is no arm {name!r}{asked} There are", *lines])
