"""The device's private adapter in one job: trained after each round, kept, mixed at the end.

It is trained once beside each version of the shared adapter that the device receives, when its
update of the round has been taken; the last time beside the version that the job ends with. What is
trained is kept before anything else happens, under a name that says beside which version: a device
that is killed at any point trains no version twice but the one it was at. Nothing of it is sent.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.errors import StorageError
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
        self._version = max(self._kept(), default=0)
        """The version of the shared adapter that it was trained beside last."""
        self._adapter = (
            self._read(self._version) if self._version else first_private(job, device, rank)
        )

    def is_due(self, now: Round) -> bool:
        """Say whether it has not been trained beside the version of the round."""
        return now.state != "waiting" and now.version > self._version

    def train(self, learner: Learning, shared: Adapter, version: int) -> None:
        """Train it for as many steps as a round has, beside a version that stays as it is.

        What has diverged is not taken: it goes on from what it was.
        """
        steps = self._job.training.steps
        self._events.emit("state", state="training its private adapter")

        def on_step(step: int, loss: float) -> None:
            self._events.emit("private", step=step, steps=steps, loss=round(loss, 4))

        trained, report = learner.train_private(self._adapter, shared, on_step)
        fine = _is_finite(trained)
        self._keep(trained if fine else self._adapter, version)
        self._events.emit(
            "private-trained", version=version, rank=self._rank, loss=report.loss, taken=fine
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
        keep_adapter(self._adapter, mixed.private, self._job.base.name)
        whole = stacked(shared, self._adapter, weight)
        keep_adapter(whole, mixed.mixed, self._job.base.name)
        return mixed

    # -- on disk ---------------------------------------------------------------------------------

    def _file(self, version: int) -> Path:
        return self._folder / f"{self._job.job}.r{self._rank}.v{version}.safetensors"

    def _kept(self) -> list[int]:
        """Return the versions beside which it was trained and whose files are here."""
        pattern = re.escape(self._file(0).name).replace("v0", r"v(\d+)")
        names = (path.name for path in self._folder.glob("*.safetensors"))
        return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]

    def _keep(self, adapter: Adapter, version: int) -> None:
        older = self._kept()
        with keeping("the private adapter", self._state):
            data = encode(to_tensors(adapter), "f32")
            write_durably(self._file(version), data, mode=PRIVATE)
            for one in older:
                self._file(one).unlink()
        self._adapter, self._version = adapter, version

    def _read(self, version: int) -> Adapter:
        job, path = self._job, self._file(version)
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
