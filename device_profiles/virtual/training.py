"""Real training for a device of a replay, worked out by an engine while virtual time goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from device_profiles.virtual.benches import Answer, Piece, Seat
from device_profiles.virtual.learning import SharedAlone
from edge_client.errors import WorkerKilled
from edge_client.learner import StepDown
from edge_client.learning import Learned, OnStep, Place
from edge_client.plan import Plan
from protocol.adapter import Adapter
from protocol.messages import Probe
from protocol.probe import TopLogits

Submit = Callable[[Piece], Callable[[], Answer]]
"""Have a piece done by an engine; see `Engine.submit`."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A training that was begun, and what waits for its result."""

    held: Adapter
    rank: int
    place: Place
    result: Callable[[], Answer]


class BenchLearner(SharedAlone):
    """Learn as `Learner` does, at a bench that an engine finds.

    A training is the engine's from its beginning: how long it takes in virtual time does not depend
    on what it comes to, so that is waited for only when that time is over.

    Raises, as every method does:
        EdgeError: what `Learner` raises.
        EngineError: the engine can't do it.
    """

    def __init__(self, submit: Submit, seat: Seat, step_down: StepDown) -> None:
        self._submit, self._seat, self._step_down = submit, seat, step_down
        self._begun: _Begun | None = None
        self._memory_mib = 0.0, 0.0
        self.text = self._ask("memory").text

    def begin(self, held: Adapter, rank: int, place: Place) -> None:
        """Have a training begin, whose result is asked for later; what was begun before is not."""
        result = self._piece("train", held=held, rank=rank, place=place)
        self._begun = _Begun(held, rank, place, result)

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        """Return what came of a training, of the one that was begun if it was this."""
        what = {"held": held, "rank": rank, "place": place}
        begun, self._begun = self._begun, None
        if begun is not None and begun.held is held and (begun.rank, begun.place) == (rank, place):
            result = begun.result
        else:
            result = self._piece("train", **what)
        answer = self._wait(result, "train", **what)
        for step, loss in answer.steps:
            on_step(step, loss)
        learned: Learned = answer.value
        return learned

    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float:
        beside = {"private": private, "weight": weight}
        loss: float = self._ask("evaluate", adapter=adapter, split=split, **beside).value
        return loss

    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits:
        logits: TopLogits = self._ask("predict", adapter=adapter, probe=probe).value
        return logits

    def memory(self) -> tuple[float, float]:
        """Return the floor and the highest peak above it, in MiB, with the present plan."""
        return self._memory_mib

    def use(self, plan: Plan) -> None:
        """Learn by another plan from now on; what was begun by the last is lost."""
        self._seat, self._begun = replace(self._seat, plan=plan), None
        self._memory_mib = 0.0, 0.0

    def stop(self) -> None:
        """End nothing: a process ends when another device needs its place."""

    def _piece(self, what: str, **arguments: Any) -> Callable[[], Answer]:
        return self._submit(Piece(self._seat, what, arguments))

    def _ask(self, what: str, **arguments: Any) -> Answer:
        return self._wait(self._piece(what, **arguments), what, **arguments)

    def _wait(self, result: Callable[[], Answer], what: str, **arguments: Any) -> Answer:
        """Wait for a piece; where its process is killed, for another one with a smaller plan."""
        while True:
            try:
                answer = result()
            except WorkerKilled as killed:
                self.use(self._step_down(self._seat.plan, str(killed)))
                result = self._piece(what, **arguments)
                continue
            floor_mib, peak_mib = answer.memory_mib
            self._memory_mib = floor_mib, max(peak_mib, self._memory_mib[1])
            return answer
