"""The device's private adapter in one job: trained when the job is finished, kept, then mixed.

It is trained beside the version that the job ended with, which stays as it is, for as many steps as
the job had, in parts. Each part is kept before the next begins, under a name that says how many
there are: a device that is killed at any point does one part again. Nothing of it is sent.

Source: FedDPA-F, arXiv 2403.19211. Its other form, FedDPA-T, trains beside every version: with as
many steps in as many parts that came to the same loss, and it delays rounds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.errors import StorageError, TrainingDiverged
from edge_client.learner import Learning
from edge_client.mixing import WEIGHTS, first_private, stacked
from edge_client.storage import keep_adapter, keeping
from protocol.adapter import Adapter, module_rank
from protocol.bands import read_adapter, to_tensors
from protocol.errors import BadTensors
from protocol.events import EventLog
from protocol.files import PRIVATE, write_durably
from protocol.messages import Job, Round
from protocol.tensors import encode

KEPT = "private-kept"
PART_STEPS = 50
"""A part has as many steps as a round, and this many at least: with each Adam begins anew."""


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
        self._job, self._rank, self._state, self._events = job, rank, state, events
        self._folder = state / KEPT
        self._steps = job.training.steps * job.rounds
        self._part_steps = max(PART_STEPS, job.training.steps)
        self._done = max(self._kept(), default=0)
        """Parts that it has been trained for."""
        self._adapter = self._read(self._done) if self._done else first_private(job, device, rank)

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

    # -- on disk ---------------------------------------------------------------------------------

    def _file(self, done: int) -> Path:
        return self._folder / f"{self._job.job}.r{self._rank}.part{done}.safetensors"

    def _kept(self) -> list[int]:
        """Return after how many parts there are files: of one, or of two after a kill."""
        pattern = re.escape(self._file(0).name).replace("part0", r"part(\d+)")
        names = (path.name for path in self._folder.glob("*.safetensors"))
        return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]

    def _keep(self, adapter: Adapter, done: int) -> None:
        older = self._kept()
        with keeping("the private adapter", self._state):
            data = encode(to_tensors(adapter), "f32")
            write_durably(self._file(done), data, mode=PRIVATE)
            for one in older:
                self._file(one).unlink()
        self._adapter, self._done = adapter, done

    def _read(self, done: int) -> Adapter:
        job, path = self._job, self._file(done)
        shapes = job.base.modules
        ranks = {name: module_rank(shape, self._rank) for name, shape in shapes.items()}
        try:
            with keeping("the private adapter", self._state):
                return read_adapter(path.read_bytes(), shapes, ranks, job.scale, "f32")
        except BadTensors as error:
            raise StorageError(
                f"the private adapter in {path} is damaged ({error}); bring it back from a backup, "
                "or take the file away to begin a new one"
            ) from None


def _is_finite(adapter: Adapter) -> bool:
    return all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in adapter.layers.values())
