"""Learning in a training process: kept between rounds, ended by the kernel, begun again smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edge_client.errors import WorkerKilled
from edge_client.learning import Learned, OnStep, Place, learn, learning_rate
from edge_client.mixing import stacked
from edge_client.plan import Backend, Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.checkpoint import Keeping, NotKept, identity_of
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text, TextReport
from protocol.adapter import Adapter, initial_adapter
from protocol.factors import Trained, trained_factors
from protocol.layers import beyond, last_blocks, within
from protocol.messages import Job, Probe
from protocol.metrics import LOSS_BEFORE, asked_for
from protocol.probe import WINDOW_TOKENS, TopLogits

T = TypeVar("T")
ALONE = 0.5
"""Share of a job's learning rate for what a device trains for itself.

Nobody averages its noise away: training alone was best at a half to a quarter of the rate that was
best with merging, on three data sets and the demo's text (docs/results.md)."""


StepDown = Callable[[Plan, str], Plan]
"""Given the plan under which training was killed, and how: return a smaller one, or raise."""


class Pauses(Protocol):
    """Whom a training asks between its steps."""

    def steps(self) -> AbstractContextManager[None]: ...
    def pause_after_step(self) -> bool: ...
    def note_unkept(self, why: str) -> None: ...


class Learner:
    """Train, evaluate and compare in a training process that is kept between rounds.

    A process that the kernel kills is followed by another with a smaller plan, which does again
    what the first was at: nothing is tried twice at one size. It is ended at `limit_mib` of
    resident memory, as if the kernel had. `start` gives a process of such a limit.

    Each training is kept in the file `kept` every so many seconds (`kept_s`), and when it pauses:
    asked for again, by this process or the next, it goes on from there. Without a file nothing is
    kept, and nothing pauses.

    Raises:
        WorkerError: the training process failed, other than by being killed.
        NoPlanFits: it was killed, and there is no smaller plan.
        TrainingPaused: `pauses` has said so.
        TrainingDiverged: its loss is not finite.
    """

    def __init__(
        self,
        job: Job,
        device: str,
        folders: Mapping[Backend, Path],
        text: Text,
        plan: Plan,
        step_down: StepDown,
        pauses: Pauses,
        *,
        kept: Path | None = None,
        kept_s: float = math.inf,
        limit_mib: float = math.inf,
        start: Callable[[float], TrainingProcess] = TrainingProcess,
    ) -> None:
        self._job = job
        self._device = device
        self._folders, self._where = folders, text
        self._step_down, self._pauses = step_down, pauses
        self._kept, self._kept_s = kept, kept_s
        self._limit_mib, self._start = limit_mib, start
        self.plan = plan
        self._process: TrainingProcess | None = None
        self.text: TextReport = self._persist(lambda: self._report)

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        """Train `rank` of the held directions for one round, or what of them the plan allows."""
        return self._persist(lambda: self._round(held, rank, place, on_step))

    def _round(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        held, rank = held.truncated(self.plan.held), min(rank, self.plan.rank)
        number = place.round_number
        factors = trained_factors(self._job.training.factors, number)

        def train(received: Adapter, frozen: Adapter | None) -> tuple[Adapter, TrainReport]:
            steps = self._job.training.steps
            return self._train(
                "fleet",
                received,
                frozen,
                received.rank,
                steps,
                on_step,
                factors=factors,
                place=place,
            )

        return learn(self._job, self._device, held, rank, number, train, blocks=self.plan.blocks)

    def train_alone(self, *, rank: int, on_step: OnStep) -> tuple[Adapter, TrainReport]:
        """Train what the whole job trains, on the same text, with no exchange and in one go.

        One run without the resets that merging brings: the best a device can do by itself.
        """
        job = self._job
        steps = job.training.steps * job.rounds
        whole = initial_adapter(job.base.modules, job.rank, job.scale, job.seed)

        def attempt() -> tuple[Adapter, TrainReport]:
            reach = min(rank, self.plan.rank)
            start = within(whole.truncated(reach), self._trained_modules)
            return self._train("alone", start, None, reach, steps, on_step, prune=False)

        return self._persist(attempt)

    def train_private(
        self, private: Adapter, shared: Adapter, *, steps: int, on_step: OnStep
    ) -> tuple[Adapter, TrainReport]:
        """Train an adapter of the device's own; the shared one is frozen."""

        def attempt() -> tuple[Adapter, TrainReport]:
            held, modules = shared.truncated(self.plan.held), self._trained_modules
            frozen = stacked(held, beyond(private, modules), 1.0)
            mine = within(private, modules)
            trained, report = self._train(
                "private", mine, frozen, private.rank, steps, on_step, prune=False
            )
            layers = {n: (trained if n in modules else private).layers[n] for n in private.layers}
            return Adapter(layers, private.scale), report

        return self._persist(attempt)

    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float:
        """Return the loss on a split of the device's text, nats a token.

        A `private` adapter times `weight` is added to the other, which the plan may cut.
        """

        def attempt() -> float:
            held = adapter.truncated(self.plan.held) if adapter else None
            if held is not None and private is not None:
                held = stacked(held, private, weight)
            self._ask("load", trained=None, frozen=held)
            loss: float = self._ask("evaluate", split=split)
            return loss

        return self._persist(attempt)

    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits:
        """Return the largest logits with an adapter at each position of the public probe."""

        def attempt() -> TopLogits:
            self._ask("load", trained=None, frozen=adapter.truncated(self.plan.held))
            window = min(WINDOW_TOKENS, self._job.training.max_tokens)
            answer: TopLogits = self._ask("predict", probe=probe, window=window)
            return answer

        return self._persist(attempt)

    def memory(self) -> tuple[float, float]:
        """Return the floor and the peak above it so far, in MiB."""
        floor_and_peak: tuple[float, float] = self._persist(lambda: self._ask("memory"))
        return floor_and_peak

    def use(self, plan: Plan) -> None:
        """Learn by another plan from now on, in another process."""
        self.stop()
        self.plan = plan

    def stop(self) -> None:
        """End the training process; the next thing asked for would start another."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def _trained_modules(self) -> frozenset[str]:
        return last_blocks(self._job.base.modules, self.plan.blocks)

    def _persist(self, work: Callable[[], T]) -> T:
        """Do something in the training process; where that is killed, again in a smaller one."""
        while True:
            try:
                if self._process is None:
                    self._process = self._start(self._limit_mib)
                    self._report: TextReport = self._ask(
                        "open",
                        model=self._folders[self.plan.backend],
                        text=self._where,
                        plan=self.plan,
                    )
                return work()
            except WorkerKilled as killed:
                self.stop()
                self.plan = self._step_down(self.plan, str(killed))

    def _ask(self, name: str, **arguments: Any) -> Any:
        assert self._process is not None, "`_persist` starts one"
        return self._process.call(name, **arguments)

    def _train(
        self,
        stream: str,
        trained: Adapter,
        frozen: Adapter | None,
        rank: int,
        steps: int,
        on_step: OnStep,
        *,
        prune: bool = True,
        factors: Trained = "both",
        place: Place | None = None,
    ) -> tuple[Adapter, TrainReport]:
        """Train for so many steps, of a round where that has a `place`."""
        settings = self._job.training
        rate = learning_rate(self._job, rank, place.round_number if place else 1)

        def progress(value: Any) -> bool:
            if isinstance(value, NotKept):
                self._pauses.note_unkept(value.why)
                return False
            on_step(*value)
            return self._pauses.pause_after_step()

        keeping = None
        if self._kept is not None:
            what = {
                "job": self._job.model_dump(mode="json"),
                "stream": stream,
                "place": (place.round_number, place.attempt) if place else (0, 0),
                "steps": steps,
            }
            identity = identity_of(self.plan, trained, frozen, what)
            keeping = Keeping(self._kept, identity, self._kept_s)
        self._ask("load", trained=trained, frozen=frozen)
        with self._pauses.steps():
            answer: tuple[Adapter, TrainReport] = self._ask(
                "train",
                stream=stream,
                settings=settings.model_copy(update={"steps": steps}),
                learning_rate=rate if stream == "fleet" else rate * ALONE,
                pruning=self._job.pruning if prune else None,
                sampling=stream == "fleet" and LOSS_BEFORE in asked_for(self._job.rule_settings),
                factors=factors,
                keeping=keeping,
                drawn_rows=place.drawn_rows if place else None,
                on_progress=progress,
            )
        return answer
