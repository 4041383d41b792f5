"""What a virtual device plans and learns with: the planner's own code, on the trace's memory."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

from device_profiles.schema import DeviceProfile
from device_profiles.traces.sample import Sample
from device_profiles.virtual.learning import ReplayLearning, Timed
from edge_client.config import Settings
from edge_client.learner import Pauses, StepDown
from edge_client.plan import HEAP_MIB, Calibration, Plan, choose_plan, memory_budget
from edge_client.pressure import LOW_MIB, LOW_SHARE
from edge_client.wanted import wanted_of
from protocol.messages import Job

FLOPS_A_CYCLE = 2.0
"""Of a core, in training: a quarter of what a vector unit of four numbers does at best."""
CORE_MHZ = 1500
"""Of a core whose clock the profile does not know."""
THROTTLED = 0.5
"""Share of its speed that a processor keeps which heat or low voltage slows down."""

MakeLearner = Callable[[Job, Plan, StepDown], ReplayLearning]


class Surveyed(Protocol):
    """What equipment asks of its device."""

    @property
    def sample(self) -> Sample: ...
    @property
    def time_s(self) -> float: ...
    def trained(self, seconds: float) -> None: ...


class VirtualEquipment:
    """Plan by the trace's memory of the moment, and learn in the device's own time.

    Raises, in `plan`:
        NoPlanFits: there is too little memory for the job now.
    """

    def __init__(
        self,
        settings: Settings,
        job: Job,
        device: Surveyed,
        calibration: Calibration,
        make_learner: MakeLearner,
    ) -> None:
        self._settings, self._job, self._device = settings, job, device
        self._calibration, self._make_learner = calibration, make_learner
        self.timed: Timed | None = None

    def plan(self, *, below_mib: float = inf) -> Plan:
        """Choose how to train with the memory that the trace has available now.

        It leaves what `pressure` wants to be left before a training may go on after a pause: a plan
        that took all there is while memory is short would wait until that is over.
        """
        memory, sample = self._settings.profile.memory, self._device.sample
        total = memory.total_mib or 0
        available = sample.memory_available_mib
        if available is None:
            available = float(memory.available_mib or total)
        budget = memory_budget(
            total_mib=max(total, available),
            available_mib=available,
            limit_mib=memory.limit_mib,
            cap_mib=self._settings.memory_cap_mib,
        )
        budget = min(budget, available - 2 * max(LOW_MIB, LOW_SHARE * total))
        return choose_plan(
            wanted_of(self._settings, self._job, 0),
            self._calibration,
            budget_mib=budget,
            threads=1,
            memory_scale=self._settings.memory_scale,
            below_mib=below_mib,
        )

    def learner(self, plan: Plan, step_down: StepDown, pauses: Pauses) -> Timed:
        training = self._job.training
        speed = tokens_s(self._settings.profile, self._job.base.parameters, self._settings)

        def now_s() -> float:
            return speed * (THROTTLED if self._device.sample.throttled else 1.0)

        self.timed = Timed(
            self._make_learner(self._job, plan, step_down),
            plan,
            step_down,
            steps=training.steps,
            step_tokens=training.tokens_per_step,
            tokens_s=now_s,
            now=lambda: self._device.time_s,
            used=self._device.trained,
        )
        return self.timed

    @property
    def taken_mib(self) -> float:
        """What training takes of the device's memory now."""
        if self.timed is None or not self.timed.runs:
            return 0.0
        return self.needs_mib(self.timed.plan)

    def needs_mib(self, plan: Plan) -> float:
        """Return what a plan takes of the recorded device's memory: `budget_above_floor` undone."""
        fixed = max(0.0, self._calibration.activations[plan.way].fixed_mib)
        undivided = fixed + self._calibration.beside_weights_mib(plan.dtype) + HEAP_MIB
        above = max(0.0, plan.predicted_mib - undivided) * self._settings.memory_scale
        return plan.floor_mib + min(plan.predicted_mib, undivided) + above


def tokens_s(profile: DeviceProfile, parameters: int, settings: Settings) -> float:
    """Return how many tokens a device trains in a second: FLOP/s over 6·N·tokens.

    N are the parameters of the model that the small one stands for. 6·N: forward two, backward
    four (arXiv 2001.08361). Rough; what matters is how unequal devices are.
    """
    mhz = sum(group.count * (group.max_mhz or CORE_MHZ) for group in profile.cores)
    flops = FLOPS_A_CYCLE * 1e6 * (mhz or CORE_MHZ)
    return flops / (6 * parameters * settings.memory_scale)
