"""Where devices of a replay really train: a few benches, at which one after the other works.

A `Piece` says all that is to be done, so it can be worked out in the replay's own process or in one
of a cluster, and comes to the same.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from aggregator.engine import Engine
from aggregator.errors import EngineError
from device_profiles.virtual.text import CarriedText
from edge_client.errors import ModelError, WorkerError, WorkerKilled
from edge_client.learner import Learner
from edge_client.model import find_model, model_hash
from edge_client.plan import Plan
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text, TextReport
from protocol.messages import Job

AT_ONCE = 2
"""Benches in the replay's own process, unless it is asked for others."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Who trains, and with what: all that a training process reads before it begins."""

    job: Job
    device: str
    model: str
    """Name of the base model, by which each machine finds it; see `find_model`."""
    text: CarriedText
    seed: int
    """Splits the text, and orders it."""
    plan: Plan

    def is_of(self, other: Seat) -> bool:
        """Say whether what was opened for another will do; both are of one replay."""
        return (self.device, self.plan) == (other.device, other.plan)


@dataclass(frozen=True, slots=True)
class Piece:
    """A method of `Learner` that a device's learner is to be asked for."""

    seat: Seat
    what: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a piece."""

    value: Any
    steps: Sequence[tuple[int, float]]
    """What was told on the way, where it was training: the step, and its loss."""
    text: TextReport
    memory_mib: tuple[float, float]
    """The process's floor, and its peak above that since it was opened."""


class Benches:
    """Keep a few benches, for whoever has something to do."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._benches: list[_Bench] = []
        """In the order in which they were worked at last."""

    def work(self, piece: Piece) -> Answer:
        """Do a piece, at the bench of its device or else at the one that has waited longest.

        Raises:
            EdgeError: what `Learner` raises; but one whose process was killed is not followed by a
                smaller one.
        """
        bench, steps = self._bench(piece.seat), list[tuple[int, float]]()
        arguments = dict(piece.arguments)
        if piece.what == "train":
            arguments["on_step"] = lambda step, loss: steps.append((step, loss))
        try:
            learner = bench.sit(piece.seat)
            value = getattr(learner, piece.what)(**arguments)
            return Answer(value, steps, learner.text, learner.memory())
        except WorkerError:
            self._benches.remove(bench)
            bench.end()
            raise

    def close(self) -> None:
        """End all processes."""
        while self._benches:
            self._benches.pop().end()

    def _bench(self, seat: Seat) -> _Bench:
        known = [bench for bench in self._benches if bench.seats(seat)]
        if not known and len(self._benches) < self._at_once:
            known = [_Bench()]
        bench = (known or self._benches)[0]
        self._benches = [each for each in self._benches if each is not bench] + [bench]
        return bench


class _Bench(TrainingProcess):
    """A training process that goes on when who sat there has gone: it holds the libraries."""

    _learner: tuple[Seat, Learner] | None = None

    def seats(self, seat: Seat) -> bool:
        """Say whether somebody sits there already."""
        return self._learner is not None and self._learner[0].is_of(seat)

    def sit(self, seat: Seat) -> Learner:
        """Return who sits there; for who is new the text is read, and the base loaded."""
        if self._learner is None or not self.seats(seat):
            self._learner = None
            with seat.text.here() as path:
                learner = Learner(
                    seat.job,
                    seat.device,
                    {"torch": _model(seat.model, seat.job.base.sha256)},
                    Text((path,), seat.seed),
                    seat.plan,
                    _give_up,
                    Unhurried(),
                    start=lambda _: self,
                )
            self._learner = seat, learner
        return self._learner[1]

    def stop(self) -> None:
        """Go on; `end` ends it."""

    def end(self) -> None:
        """End the process."""
        super().stop()


_THERE = Benches(1)


def work_there(piece: Piece) -> Answer:
    """Do a piece in a process of a cluster, which does one at a time and has a bench of its own."""
    return _THERE.work(piece)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where pieces are done: an engine, and the benches at which it works."""

    engine: Engine
    work: Callable[[Piece], Answer]

    def submit(self, piece: Piece) -> Callable[[], Answer]:
        """Have a piece done, as `Engine.submit`."""
        return self.engine.submit(self.work, piece)

    def map(self, pieces: Iterable[Piece]) -> Iterator[Answer]:
        """Yield what comes of each piece, as `Engine.map`."""
        return self.engine.map(self.work, pieces)


@contextmanager
def workplace(engine: Engine, at_once: int) -> Iterator[Workplace]:
    """Yield the place of an engine; in this process it has so many benches, which then end."""
    if engine.name != "plain":
        yield Workplace(engine, work_there)
        return
    benches = Benches(at_once)
    try:
        yield Workplace(engine, benches.work)
    finally:
        benches.close()


class Unhurried:
    """Never pause: when a real training runs, its virtual time is over, or is not asked for."""

    def steps(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pause_after_step(self) -> bool:
        return False

    def note_unkept(self, why: str) -> None:
        """Nothing is to be kept."""


@cache
def _model(name: str, sha256: str) -> Path:
    """Find a model on this machine.

    Raises:
        EngineError: it is not there, or another one, as it is where the replay has begun.
    """
    try:
        folder = find_model(name)
        if model_hash(folder) == sha256:
            return folder
        why = f"{folder} is another model than the job's base {name!r}"
    except ModelError as error:
        why = str(error)
    raise EngineError(f"{socket.gethostname()} can't train for the replay: {why}")


def _give_up(plan: Plan, why: str) -> NoReturn:
    """Leave it to the device to plan anew."""
    raise WorkerKilled(why)
