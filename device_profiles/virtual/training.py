"""Real training for a few devices of a replay: few training processes at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from edge_client.config import Settings
from edge_client.learner import Learner, StepDown
from edge_client.learning import Learned, OnStep
from edge_client.plan import Plan
from edge_client.trainer import checkpoint
from edge_client.trainer.worker import Text
from protocol.adapter import Adapter
from protocol.messages import Job

AT_ONCE = 2
"""Training processes that are kept by default: each holds the libraries and the base model."""


class Benches:
    """Keep the processes of those that trained last, and end the others'."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._last: list[BenchLearner] = []

    def take(self, learner: BenchLearner) -> None:
        """Note who is to work now; the one that has worked longest ago gives its process up."""
        if learner in self._last:
            self._last.remove(learner)
        self._last.append(learner)
        while len(self._last) > self._at_once:
            self._last.pop(0).stop()

    def close(self) -> None:
        """End all of them."""
        for learner in self._last:
            learner.stop()
        self._last.clear()


class BenchLearner(Learner):
    """A device's own learner, whose process ends when others need its place."""

    def __init__(
        self,
        benches: Benches,
        job: Job,
        settings: Settings,
        model: Path,
        plan: Plan,
        step_down: StepDown,
    ) -> None:
        self._benches = benches
        super().__init__(
            job,
            settings.name,
            {"torch": model},
            Text(settings.data, settings.seed),
            plan,
            step_down,
            Unhurried(),
            kept=settings.state / checkpoint.FILE,
            kept_s=math.inf,
        )
        benches.take(self)

    def train(
        self,
        held: Adapter,
        *,
        rank: int,
        round_number: int,
        attempt: int,
        drawn_rows: int,
        on_step: OnStep,
    ) -> Learned:
        self._benches.take(self)
        return super().train(
            held,
            rank=rank,
            round_number=round_number,
            attempt=attempt,
            drawn_rows=drawn_rows,
            on_step=on_step,
        )

    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float:
        self._benches.take(self)
        return super().evaluate(adapter, split, private=private, weight=weight)


class Unhurried:
    """Never pause: when a real training runs, its virtual time is over."""

    def steps(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pause_after_step(self) -> bool:
        return False

    def note_unkept(self, why: str) -> None:
        """Nothing is to be kept."""


def text_of(parts: Sequence[Path], index: int) -> tuple[Path, ...]:
    """Return the text of a device: one part after the other."""
    return (parts[index % len(parts)],)
