"""From a profile and a job to a plan and a learner: find the model, measure, choose, train."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Protocol

from device_profiles.schema import DeviceProfile
from edge_client.calibrate import calibrate
from edge_client.config import Settings
from edge_client.errors import ConfigError, ModelError, NoPlanFits
from edge_client.learner import Learner, Learning, StepDown
from edge_client.model import find_model, model_hash
from edge_client.plan import Plan, choose_plan, memory_budget
from edge_client.profile import native_bf16
from edge_client.trainer.worker import Text
from protocol.layers import block_count
from protocol.messages import Job


class Equipment(Protocol):
    """What a device has to learn one job with; an agent takes another than its own."""

    def plan(self, *, below_mib: float = inf) -> Plan:
        """Choose how to train; `below_mib` is a predicted peak that was too much."""
        ...

    def learner(self, plan: Plan, step_down: StepDown) -> Learning: ...


Equip = Callable[[Settings, Job], Equipment]


class TrainingEquipment:
    """Learn a job by training its base model on the owner's text.

    Raises:
        ModelError: the model is not there, or is another model than the job's.
    """

    def __init__(self, settings: Settings, job: Job) -> None:
        self._settings, self._job = settings, job
        self._model = find_base(settings, job)

    def plan(self, *, below_mib: float = inf) -> Plan:
        """Measure what training takes on this device, and choose how to train.

        Raises:
            NoPlanFits: the device's memory is too small for the job.
            ConfigError: its memory is unknown.
        """
        return make_plan(self._settings, self._job, self._model, below_mib=below_mib)

    def learner(self, plan: Plan, step_down: StepDown) -> Learner:
        text = Text(self._settings.data, self._settings.seed)
        return Learner(self._job, self._settings.name, self._model, text, plan, step_down)


def make_plan(settings: Settings, job: Job, model: Path, *, below_mib: float = inf) -> Plan:
    """Measure what training takes on this device, and choose how to train.

    `below_mib` is a predicted peak that was too much (`Outbox.ceiling_mib`). Fewer blocks than all
    are measured only where no plan of more blocks fits, or the owner wants it so.

    Raises:
        NoPlanFits: the device's memory is too small for the job.
        ConfigError: its memory is unknown, or the owner asks for blocks that there are not.
    """
    refused: NoPlanFits | None = None
    for blocks in block_choices(settings, job):
        try:
            return _plan_of(settings, job, model, blocks, below_mib)
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


def _plan_of(settings: Settings, job: Job, model: Path, blocks: int, below_mib: float) -> Plan:
    """Measure what training some blocks takes, and choose how to train them."""
    fast = native_bf16(settings.profile)
    calibration = calibrate(
        model,
        job.base,
        dtypes=("bf16",) if fast else ("f32", "bf16"),
        threads=settings.threads,
        seq_len=job.training.max_tokens,
        scale=job.scale,
        cache=settings.cache,
        blocks=blocks,
    )
    return choose_plan(
        job.base.modules,
        calibration,
        budget_mib=total_budget_mib(settings.profile, settings.memory_cap_mib),
        memory_scale=settings.memory_scale,
        ladder=job.ladder,
        shared_rank=job.rank if job.remainder == "frozen" else 0,
        training=job.training,
        native_bf16=fast,
        threads=settings.threads,
        below_mib=below_mib,
        private_rank=settings.private_rank,
        blocks=blocks,
    )


def total_budget_mib(profile: DeviceProfile, cap_mib: float | None) -> float:
    """Return what the training process may take in all.

    Where the device's memory is unknown the owner's cap is all there is to go by.

    Raises:
        ConfigError: the profile does not know the device's memory, and there is no cap.
    """
    memory = profile.memory
    if memory.total_mib is None or memory.available_mib is None:
        if cap_mib is not None:
            return min(cap_mib, inf if memory.limit_mib is None else memory.limit_mib)
        raise ConfigError("this device's memory is unknown; say how much to use with --memory-cap")
    return memory_budget(
        total_mib=memory.total_mib,
        available_mib=memory.available_mib,
        limit_mib=memory.limit_mib,
        cap_mib=cap_mib,
    )
