"""A device that makes its updates up: the real agent, outbox and sender, no model and no torch.

`python -m tests.faults.device` notes in a ledger of its own, durably and before anything else
happens, what it trained on, which updates it made and what it was told about them. Each update
carries a mark that can be found again in what the aggregator merged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from math import inf
from pathlib import Path

import numpy as np

import edge_client.agent
from device_profiles.schema import load_profile
from edge_client.agent import Agent
from edge_client.config import Settings
from edge_client.learner import Pauses, StepDown
from edge_client.learning import Learned, OnStep, Place, learn
from edge_client.membership import identity
from edge_client.outbox import Outbox
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter, Factors
from protocol.cli import run_command
from protocol.events import EventLog
from protocol.files import lock_folder
from protocol.messages import Control, Job, Probe, UploadManifest
from protocol.probe import TopLogits

TICK_S = 0.05
"""The agent looks this often for what is to be done: rounds here take parts of a second."""
ROWS = 3
"""So many rows of text each training draws, had there been any."""


class Ledger:
    """Append what happened, a line each, synced before anything follows from it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, **fields: object) -> None:
        os.write(self._file, json.dumps({"what": what, **fields}).encode() + b"\n")
        os.fsync(self._file)


def ramp(shape: tuple[int, ...], module: int) -> np.ndarray:
    """Return what a mark is multiplied with: another number at each place of each module."""
    size = int(np.prod(shape))
    numbers = np.linspace(0.5, 1.5, size, dtype=np.float64) * (1 + 0.1 * module)
    return numbers.reshape(shape).astype(np.float32)


def marked(adapter: Adapter, mark: float) -> Adapter:
    """Return an adapter moved by a mark."""
    layers = {}
    for number, name in enumerate(sorted(adapter.layers)):
        f = adapter.layers[name]
        step = np.float32(mark)
        layers[name] = Factors(
            f.a + step * ramp(f.a.shape, number), f.b + step * ramp(f.b.shape, number)
        )
    return Adapter(layers, adapter.scale)


def digest(adapter: Adapter) -> str:
    """Return a hash of an adapter's numbers."""
    found = hashlib.sha256()
    for name in sorted(adapter.layers):
        for factor in (adapter.layers[name].a, adapter.layers[name].b):
            found.update(np.ascontiguousarray(factor, np.float32).tobytes())
    return found.hexdigest()


class MarkingLearner:
    """Learn in milliseconds: move everything by one random number."""

    def __init__(self, job: Job, device: str, ledger: Ledger) -> None:
        self._job, self._device, self._ledger = job, device, ledger
        self.text = TextReport(1000, 100, ())
        self.mark = 0.0

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        self._ledger.note(
            "trained", round=place.round_number, digest=digest(held), drawn_rows=place.drawn_rows
        )
        self.mark = random.SystemRandom().choice((-1, 1)) * random.SystemRandom().uniform(
            1e-3, 3e-3
        )
        tokens = random.SystemRandom().randint(500, 1500)

        def train(received: Adapter, _: Adapter | None) -> tuple[Adapter, TrainReport]:
            report = TrainReport(1, tokens, 1.0, 0.0, drawn_rows=place.drawn_rows + ROWS)
            return marked(received, self.mark), report

        return learn(self._job, self._device, held, rank, place.round_number, train)

    def evaluate(self, adapter: Adapter | None, split: str = "held_out") -> float:
        return 1.0

    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits:
        positions = np.zeros((1, 1))
        return TopLogits(positions, positions)

    def memory(self) -> tuple[float, float]:
        return 1.0, 1.0

    def stop(self) -> None:
        pass


class MadeUp:
    """Plan the whole shared adapter, and learn nothing."""

    def __init__(self, settings: Settings, job: Job, ledger: Ledger) -> None:
        self._device, self._job = settings.name, job
        self.ledger = ledger

    def plan(self, *, below_mib: float = inf) -> Plan:
        rank = self._job.rank
        return Plan(rank, rank, 1, self._job.training.max_tokens, False, "f32", 1, 1.0, 2.0)

    def learner(self, plan: Plan, step_down: StepDown, pauses: Pauses) -> MarkingLearner:
        return MarkingLearner(self._job, self._device, self.ledger)


class WatchedOutbox(Outbox):
    """Note each update before it is put."""

    ledger: Ledger
    agent: WatchedAgent

    def put(
        self,
        manifest: UploadManifest,
        data: bytes,
        *,
        rank: int,
        own_loss: float | None = None,
        drawn_rows: int = 0,
    ) -> None:
        self.ledger.note(
            "made",
            upload=manifest.upload,
            round=manifest.round,
            version=manifest.version,
            sha256=manifest.file.sha256,
            examples=manifest.examples,
            mark=self.agent.mark,
        )
        super().put(manifest, data, rank=rank, own_loss=own_loss, drawn_rows=drawn_rows)


class WatchedAgent(Agent):
    """Note what the aggregator says of updates."""

    def __init__(self, settings: Settings, events: EventLog, ledger: Ledger) -> None:
        super().__init__(settings, events, equip=lambda s, j: MadeUp(s, j, ledger))
        self._ledger = ledger
        assert isinstance(self._outbox, WatchedOutbox)
        self._outbox.ledger, self._outbox.agent = ledger, self

    @property
    def mark(self) -> float:
        assert isinstance(self._learner, MarkingLearner)
        return self._learner.mark

    def _on_control(self, message: Control) -> None:
        if message.kind != "need":
            self._ledger.note(message.kind, upload=message.upload, reason=message.reason)
        super()._on_control(message)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m tests.faults.device", description=__doc__)
    arguments.add_argument("--name", required=True)
    arguments.add_argument("--broker", required=True)
    arguments.add_argument("--state", type=Path, required=True)
    arguments.add_argument("--job", default="faults")
    given = arguments.parse_args()
    edge_client.agent.TICK_S = TICK_S
    edge_client.agent.Outbox = WatchedOutbox
    name, broker, tls = identity(
        given.state, name=given.name, broker=given.broker, default_name=given.name
    )
    settings = Settings(
        name=name,
        broker=broker,
        tls=tls,
        data=(),
        state=given.state,
        cache=given.state,
        profile=load_profile("laptop-16gb"),
        job=given.job,
    )
    with lock_folder(settings.state, "edge-client"):
        ledger = Ledger(given.state / "ledger.jsonl")
        WatchedAgent(settings, EventLog(as_json=True, device=given.name), ledger).run()


if __name__ == "__main__":
    run_command(main)
