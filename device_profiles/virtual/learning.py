"""Training as a replay has it: it takes its device's time, and then is real, or was so before.

Timed      lets a training take virtual time, in which it can pause and be killed
  around a BenchLearner   it really trains meanwhile, or then               (`train`)
  around Recorded         it then moves the adapter as a real training once did (`recorded`)
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Protocol

import numpy as np

from device_profiles.virtual.pool import Pool
from edge_client.errors import TrainingPaused
from edge_client.learner import StepDown
from edge_client.learning import Learned, Learning, OnStep, Place, learn
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter, Factors
from protocol.messages import Job, Probe
from protocol.probe import TopLogits

NEVER_S = 1e-6
"""Less than this of a training is nothing: times are sums of floats."""


class ReplayLearning(Learning, Protocol):
    """What a replay asks of whoever learns."""

    def begin(self, held: Adapter, rank: int, place: Place) -> None:
        """Hear of a training that `train` is asked for later, unless it comes to nothing."""
        ...


class SharedAlone:
    """Learn nothing but the shared adapter, as all do in a replay."""

    def train_alone(self, *, rank: int, on_step: OnStep) -> tuple[Adapter, TrainReport]:
        raise NotImplementedError("a device of a replay compares nothing")

    def train_private(
        self, private: Adapter, shared: Adapter, *, steps: int, on_step: OnStep
    ) -> tuple[Adapter, TrainReport]:
        raise NotImplementedError("a device of a replay has no private adapter")


class Recorded(SharedAlone):
    """Move what is to be trained as a recorded training of that rank moved its own."""

    def __init__(self, job: Job, device: str, pool: Pool, plan: Plan) -> None:
        self._job, self._device, self._pool, self._plan = job, device, pool, plan
        self.text: TextReport = pool.text

    def begin(self, held: Adapter, rank: int, place: Place) -> None:
        """Begin nothing: it takes no time."""

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        """Return what a training would: drawn, cut and measured by the learner's own code."""
        held, rank = held.truncated(self._plan.held), min(rank, self._plan.rank)

        def train(received: Adapter, _: Adapter | None) -> tuple[Adapter, TrainReport]:
            kept = self._pool.update(received.rank, self._device, place.round_number)
            report = TrainReport(
                self._job.training.steps,
                kept.tokens,
                kept.loss,
                0.0,
                drawn_rows=place.drawn_rows + kept.rows,
            )
            return moved(received, kept.change), report

        return learn(self._job, self._device, held, rank, place.round_number, train)

    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float:
        """Return the recorded loss, of the base: nothing is measured here."""
        return self._pool.base_loss

    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits:
        raise NotImplementedError("a recorded device predicts nothing")

    def memory(self) -> tuple[float, float]:
        return self._plan.floor_mib, self._plan.predicted_mib

    def use(self, plan: Plan) -> None:
        self._plan = plan

    def stop(self) -> None:
        """End nothing: there is no process."""


def moved(adapter: Adapter, change: Adapter) -> Adapter:
    """Return an adapter plus the first directions of a change that has as many or more."""
    layers = {}
    for name, own in adapter.layers.items():
        by = change.layers[name]
        a, b = own.a + by.a[: own.rank], own.b + by.b[:, : own.rank]
        layers[name] = Factors(a.astype(np.float32), b.astype(np.float32))
    return Adapter(layers, adapter.scale)


class Timed(SharedAlone):
    """Let each training of another take virtual time; until that is over it is paused.

    `tokens_s` says how fast the device trains now, `steps` and `step_tokens` what a training is. A
    pause loses the step that is under way. Told that the device was out of memory, it takes the
    smaller plan that `step_down` gives, as a learner whose process was killed does, and begins
    anew.
    """

    def __init__(
        self,
        inner: ReplayLearning,
        plan: Plan,
        step_down: StepDown,
        *,
        steps: int,
        step_tokens: int,
        tokens_s: Callable[[], float],
        now: Callable[[], float],
        used: Callable[[float], None],
    ) -> None:
        self._inner, self.plan, self._step_down = inner, plan, step_down
        self.text: TextReport = inner.text
        self._steps, self._step_tokens = steps, step_tokens
        self._tokens_s, self._now, self._used = tokens_s, now, used
        self._place: Place | None = None
        """What is trained for; None: nothing is."""
        self._tokens_left = 0.0
        self._since: float | None = None
        """Since when it runs at `_speed`, in tokens a second; None: it is paused."""
        self._speed = 0.0
        self.killed = 0

    @property
    def is_under_way(self) -> bool:
        """Whether a training has begun and is not over."""
        return self._place is not None

    @property
    def runs(self) -> bool:
        """Whether it takes memory and time now."""
        return self._since is not None

    @property
    def ends_s(self) -> float:
        """When it would be over at the present speed."""
        return self._now() + self._tokens_left / max(self._tokens_s(), NEVER_S)

    def account(self) -> None:
        """Count what has been trained until now, before the speed changes."""
        if self._since is not None:
            past_s = self._now() - self._since
            self._used(past_s)
            self._tokens_left = max(0.0, self._tokens_left - past_s * self._speed)
            self._since, self._speed = self._now(), self._tokens_s()

    def pause(self) -> None:
        """Stop after the last whole step."""
        if self._since is not None:
            self.account()
            steps = ceil(self._tokens_left / self._step_tokens - NEVER_S)
            self._tokens_left = float(min(steps, self._steps) * self._step_tokens)
            self._since = None

    def go_on(self) -> None:
        """Run, if there is something to do."""
        if self.is_under_way and self._since is None:
            self._since, self._speed = self._now(), self._tokens_s()

    def kill(self, why: str) -> None:
        """Lose the training: the device had no memory for it."""
        self.pause()
        self.killed += 1
        self._place = None
        self.use(self._step_down(self.plan, why))

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        """Return what was learned once its time is over.

        Raises:
            TrainingPaused: it is not.
        """
        if self._place != place:
            self._place = place
            self._tokens_left, self._since = float(self._steps * self._step_tokens), None
            self._inner.begin(held, rank, place)
        self.go_on()
        self.account()
        if self._tokens_left > NEVER_S * self._step_tokens:
            done = self._steps - ceil(self._tokens_left / self._step_tokens - NEVER_S)
            raise TrainingPaused(max(0, done))
        self._place = self._since = None
        return self._inner.train(held, rank, place, on_step)

    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float:
        return self._inner.evaluate(adapter, split, private=private, weight=weight)

    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits:
        return self._inner.predict(adapter, probe)

    def memory(self) -> tuple[float, float]:
        return self._inner.memory()

    def use(self, plan: Plan) -> None:
        """Train by another plan: what is under way begins anew."""
        self._place = self._since = None
        self.plan = plan
        self._inner.use(plan)

    def stop(self) -> None:
        """Give memory back; what is under way goes on later."""
        self.pause()
        self._inner.stop()
