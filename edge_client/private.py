"""The device's private adapter in one job: trained when the job is finished, kept, then mixed.

It is trained beside the version that the job ended with, which stays as it is, for as many steps as
the job had, in parts. Each part is kept before the next begins, under a name that says how many
there are: a device that is killed at any point does one part again. Nothing of it is sent.

Source: FedDPA-F, arXiv 2403.19211. Its other form, FedDPA-T, trains beside every version: with as
many steps in as many parts that came to the same loss, and it delays rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.errors import TrainingDiverged
from edge_client.learning import Learning
from edge_client.mixing import WEIGHTS, first_private, stacked
from edge_client.numbered import NumberedAdapter
from edge_client.storage import keep_adapter
from protocol.adapter import Adapter
from protocol.events import EventLog
from protocol.messages import Job, Round

KEPT = "private-kept"
PART_STEPS = 50
"""A part has as many steps as a round, and this many at least: with each the optimiser begins."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a job left: the mixing weight, and held-out losses in nats a token."""

    weight: float
    loss_shared: float
    loss_mixed: float
    private: Path
    """PEFT folder of the private adapter by itself."""
    mixed: Path
    """PEFT folder of both, the private one times the weight."""

    def as_dict(self) -> dict[str, object]:
        return {
            "weight": self.weight,
            "loss_shared": self.loss_shared,
            "loss_mixed": self.loss_mixed,
            "adapter": str(self.private),
            "mixed": str(self.mixed),
        }


class Private:
    """Hold the private adapter of `rank` of a device in a job; in `state` it outlives the process.

    Raises, as every method does:
        StorageError: it can't be kept, or what was kept is damaged.
    """

    def __init__(self, job: Job, device: str, rank: int, state: Path, events: EventLog) -> None:
        self._job, self._state, self._events = job, state, events
        self._kept = NumberedAdapter(
            job, rank, state, folder=KEPT, what="the private adapter", counts="part"
        )
        self._steps = job.training.steps * job.rounds
        self._part_steps = max(PART_STEPS, job.training.steps)
        self._done = self._kept.newest() or 0
        """Parts that it has been trained for."""
        self._adapter = (
            self._kept.read(self._done) if self._done else first_private(job, device, rank)
        )

    def is_due(self, now: Round) -> bool:
        """Say whether the job is finished, and steps of its training are left."""
        return now.state == "finished" and self._done * self._part_steps < self._steps

    def train(self, learner: Learning, shared: Adapter) -> None:
        """Train it for a part beside the shared adapter.

        What has diverged is not taken: it goes on from what it was.
        """
        before = self._done * self._part_steps

        def on_step(step: int, loss: float) -> None:
            self._events.emit("private", step=before + step, steps=self._steps, loss=round(loss, 4))

        steps = min(self._part_steps, self._steps - before)
        loss = math.nan
        try:
            trained, report = learner.train_private(
                self._adapter, shared, steps=steps, on_step=on_step
            )
            fine, loss = _is_finite(trained), report.loss
        except TrainingDiverged:
            fine = False
        self._keep(trained if fine else self._adapter, self._done + 1)
        self._events.emit(
            "private-kept", part=self._done, loss=loss, steps=steps, diverged=not fine
        )

    def mix(self, learner: Learning, shared: Adapter) -> Mixed:
        """Choose the weight on the trust split, and write both adapters where PEFT finds them."""

        def loss(weight: float, split: str) -> float:
            found = learner.evaluate(shared, split, private=self._adapter, weight=weight)
            return found if math.isfinite(found) else math.inf

        weight = min(WEIGHTS, key=lambda w: (loss(w, "trust"), w))
        mixed = Mixed(
            weight,
            loss(0.0, "held_out"),
            loss(weight, "held_out"),
            self._state / "private",
            self._state / "mixed",
        )
        keep_adapter(self._adapter, mixed.private, self._job.base)
        whole = stacked(shared, self._adapter, weight)
        keep_adapter(whole, mixed.mixed, self._job.base)
        return mixed

    def _keep(self, adapter: Adapter, done: int) -> None:
        self._kept.keep(done, adapter)
        self._adapter, self._done = adapter, done


def _is_finite(adapter: Adapter) -> bool:
    return all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in adapter.layers.values())
