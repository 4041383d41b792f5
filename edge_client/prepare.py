"""From a profile and a job to a plan and a learner: find the model, measure, choose, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Protocol

from device_profiles.schema import DeviceProfile
from edge_client.backends import better, find_backends
from edge_client.calibrate import ProbingProcess, calibrate, choose_threads
from edge_client.config import Settings, most_threads
from edge_client.errors import ConfigError, NoPlanFits
from edge_client.learner import Learner, Pauses, StepDown
from edge_client.learning import Learning
from edge_client.memory import Way, optimizer_of, resident_mib
from edge_client.plan import (
    Backend,
    Calibration,
    Plan,
    all_plans,
    choose_plan,
    memory_budget,
)
from edge_client.profile import native_bf16
from edge_client.trainer import checkpoint
from edge_client.trainer.worker import Text
from edge_client.wanted import Wanted, wanted_of
from protocol.layers import block_count
from protocol.messages import Job


class Equipment(Protocol):
    """What a device has to learn one job with; an agent takes another than its own."""

    def plan(self, *, below_mib: float = inf) -> Plan:
        """Choose how to train; `below_mib` is a predicted peak that was too much."""
        ...

    def learner(self, plan: Plan, step_down: StepDown, pauses: Pauses) -> Learning: ...


Equip = Callable[[Settings, Job], Equipment]


class TrainingEquipment:
    """Learn a job by training its base model on the owner's text.

    Raises:
        ModelWanted: the model has to be downloaded first.
        ModelError: the model is not there, or is another model than the job's.
    """

    def __init__(self, settings: Settings, job: Job) -> None:
        self._settings, self._job = settings, job
        self._backends = find_backends(settings, job, downloads=False)

    def plan(self, *, below_mib: float = inf) -> Plan:
        """Measure what training takes on this device, and choose how to train.

        Raises:
            NoPlanFits: the device's memory is too small for the job.
            ConfigError: its memory is unknown.
        """
        shared_rank = wanted_of(self._settings, self._job, 0).shared_rank
        plans: dict[Backend, Plan | NoPlanFits] = {}
        for backend, folder in self._backends.folders.items():
            try:
                plans[backend] = make_plan(
                    self._settings, self._job, folder, below_mib=below_mib, backend=backend
                )
            except NoPlanFits as error:
                plans[backend] = error
        return better(plans, shared_rank, self._backends.missing)

    def learner(self, plan: Plan, step_down: StepDown, pauses: Pauses) -> Learner:
        settings = self._settings
        return Learner(
            self._job,
            settings.name,
            self._backends.folders,
            Text(settings.data, settings.seed),
            plan,
            step_down,
            pauses,
            kept=settings.state / checkpoint.FILE,
            kept_s=settings.checkpoint_s,
            limit_mib=settings.memory_cap_mib or inf,
        )


def make_plan(
    settings: Settings,
    job: Job,
    model: Path,
    *,
    below_mib: float = inf,
    backend: Backend = "torch",
) -> Plan:
    """Measure what training with a backend takes on this device, and choose how to train.

    `model` is the folder of that backend's base: the model's, or for onnx the artifact set.
    `below_mib` is a predicted peak that was too much (`Outbox.ceiling_mib`). Fewer blocks than all
    are measured only where no plan of more blocks fits, or the owner wants it so.

    Raises:
        NoPlanFits: the device's memory is too small for the job.
        ConfigError: its memory is unknown, or the owner asks for blocks that there are not.
    """
    refused: NoPlanFits | None = None
    for blocks in block_choices(settings, job):
        try:
            return _plan_of(settings, job, model, blocks, below_mib, backend)
        except NoPlanFits as error:
            refused = refused or error
    assert refused is not None, "there is a choice at least"
    raise refused


def block_choices(settings: Settings, job: Job) -> list[int]:
    """Return how many of the last blocks to train, best first; 0 stands for all.

    Raises:
        ConfigError: the owner asks for some, and the job or its model has no such choice.
    """
    count, asked = block_count(job.base.modules), settings.train_blocks
    if asked and job.layers == "all":
        raise ConfigError(
            f"--train-blocks {asked}: job {job.job!r} has every device train all blocks "
            "(layers = 'all'); leave it out, or ask for a job with layers = 'fit'"
        )
    if asked > count:
        raise ConfigError(f"--train-blocks {asked}: the job's model has {count} blocks")
    if asked:
        return [asked if asked < count else 0]
    choices = [0]
    while job.layers == "fit" and count > 1:
        count //= 2
        choices.append(count)
    return choices


def _plan_of(
    settings: Settings, job: Job, model: Path, blocks: int, below_mib: float, backend: Backend
) -> Plan:
    """Measure what training some blocks takes, and choose how to train them."""
    found = planning(settings, job, model, blocks, backend, below_mib=below_mib)
    return found.best(below_mib=below_mib)


@dataclass(frozen=True, slots=True)
class Planning:
    """All that a choice of plan rests on."""

    wanted: Wanted
    calibration: Calibration
    budget_mib: float
    """What the training process may take in all."""
    threads: int
    memory_scale: float = 1.0

    def best(self, *, below_mib: float = inf) -> Plan:
        """Return the best plan; see `choose_plan`."""
        return choose_plan(
            self.wanted,
            self.calibration,
            budget_mib=self.budget_mib,
            threads=self.threads,
            memory_scale=self.memory_scale,
            below_mib=below_mib,
        )

    def is_unbeaten(self, plan: Plan) -> bool:
        """Say whether no plan with less memory or more of it could be better: only a faster dtype.

        That is one of whole sequences, of the largest rank that may be and with Adam's moments,
        unless the job wants none, by the fastest way that was measured.
        Training without making blocks again must have been measured, for it is faster.
        """
        wanted = self.wanted
        ranks, held = zip(*wanted.adapters, strict=True)
        return (
            plan.seq_len == wanted.training.max_tokens
            and plan.rank == max(ranks)
            and plan.held == max(held)
            and plan.optimizer == optimizer_of(wanted.training)
            and Way(plan.dtype, checkpointing=False) in self.calibration.activations
            and plan.predicted_tokens_s >= max(self.calibration.tokens_s.values())
        )

    def every(self, seq_len: int) -> list[Plan]:
        """Return every plan of one sequence length; see `all_plans`."""
        return all_plans(
            self.wanted,
            self.calibration,
            seq_len,
            budget_mib=self.budget_mib,
            threads=self.threads,
            memory_scale=self.memory_scale,
        )


def planning(
    settings: Settings,
    job: Job,
    model: Path,
    blocks: int,
    backend: Backend = "torch",
    *,
    below_mib: float = inf,
) -> Planning:
    """Measure what training some blocks takes here, or remember it.

    Where the CPU has no bf16, float32 is measured first, and the rest only if it is of use. Base
    weights in bf16 (`mixed`) save memory and cost time: not where the best plan there could be in
    float32 fits. Computing in bf16, which is slow, takes least memory of all: only if nothing else
    fits (below `below_mib`).

    Raises:
        ConfigError: the device's memory is unknown.
        NoPlanFits: what the owner lets a round transfer is too little.
        WorkerError: a probe failed.
    """
    budget_mib = total_budget_mib(settings.profile, settings.memory_cap_mib, own_mib=resident_mib())
    wanted = wanted_of(settings, job, blocks)
    _ = wanted.adapters  # raises before anything is measured

    def with_dtypes(dtypes: tuple[str, ...]) -> Planning:
        threads, constants = measured(settings, job, model, blocks, budget_mib, backend, dtypes)
        return Planning(wanted, constants, budget_mib, threads, settings.memory_scale)

    if backend == "onnx":
        return with_dtypes(("f32",))
    if native_bf16(settings.profile):
        return with_dtypes(("bf16", "f32"))
    found = with_dtypes(("f32",))
    for dtypes in (("f32", "mixed"), ("f32", "mixed", "bf16")):
        try:
            best = found.best(below_mib=below_mib)
            if len(dtypes) > 2 or found.is_unbeaten(best):
                return found
        except NoPlanFits:
            pass
        found = with_dtypes(dtypes)
    return found


def measured(
    settings: Settings,
    job: Job,
    model: Path,
    blocks: int,
    budget_mib: float,
    backend: Backend,
    dtypes: tuple[str, ...],
) -> tuple[int, Calibration]:
    """Return how many threads are worth it here, and the constants of the memory model.

    Every dtype is measured that there is memory for: which is faster no list of CPU features says,
    for it depends on the model too.
    """
    with ProbingProcess(budget_mib) as process:
        threads = settings.threads or choose_threads(
            model,
            job.base,
            dtype=dtypes[0],
            most=most_threads(settings.profile),
            scale=job.scale,
            cache=settings.cache,
            limit_mib=budget_mib,
            backend=backend,
            process=process,
        )
        calibration = calibrate(
            model,
            job.base,
            dtypes=dtypes,
            threads=threads,
            seq_len=job.training.max_tokens,
            scale=job.scale,
            cache=settings.cache,
            blocks=blocks,
            limit_mib=budget_mib,
            backend=backend,
            process=process,
        )
    return threads, calibration


def total_budget_mib(
    profile: DeviceProfile, cap_mib: float | None, *, own_mib: float = 0.0
) -> float:
    """Return what the training process may take in all.

    A cgroup's limit is the agent's too, which takes `own_mib` of it. Where the device's memory is
    unknown the owner's cap is all there is to go by.

    Raises:
        ConfigError: the profile does not know the device's memory, and there is no cap.
    """
    memory = profile.memory
    limit_mib = None if memory.limit_mib is None else max(0.0, memory.limit_mib - own_mib)
    if memory.total_mib is None or memory.available_mib is None:
        if cap_mib is not None:
            return min(cap_mib, inf if limit_mib is None else limit_mib)
        raise ConfigError("this device's memory is unknown; say how much to use with --memory-cap")
    return memory_budget(
        total_mib=memory.total_mib,
        available_mib=memory.available_mib,
        limit_mib=limit_mib,
        cap_mib=cap_mib,
    )
