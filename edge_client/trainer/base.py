"""What a trainer is: numpy in, numpy out, whatever computes in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_client.data import Batch
from edge_client.plan import Plan
from protocol.adapter import Adapter, Shapes
from protocol.factors import Trained
from protocol.messages import Pruning, Training
from protocol.probe import TopLogits

OnStep = Callable[[int, float], None]
"""Called after each optimiser step with its number (from 1) and its loss (nats a token)."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a round of local training came to."""

    steps: int
    tokens: int
    """Tokens that counted in the loss."""
    loss: float
    """Mean over the steps, nats a token."""
    seconds: float
    sample_losses: tuple[float, float] | None = None
    """On the same rows of its training text before and after, if that was asked for."""
    drawn_rows: int = 0
    """How far its stream of text is: rows drawn in all, also by trainings before this one."""


class Resumable(Protocol):
    """The state of a training between two steps, whatever computes it."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return factors, the optimiser's state, and what else the outcome follows from."""
        ...

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Go on from what `arrays` returned; say False, and change nothing, if it does not fit."""
        ...


class Between(Protocol):
    """What a training asks between its steps."""

    def begin(self, state: Resumable) -> tuple[list[float], int]:
        """Put the state of an earlier run back; return its losses and tokens so far."""
        ...

    def after_step(self, state: Resumable, losses: list[float], tokens: int) -> None:
        """Keep the state, if it is time.

        Raises:
            TrainingPaused: do no further step now.
            TrainingDiverged: the state is not finite.
        """
        ...


class Trainer(Protocol):
    """Train the `trained` part of an adapter in the context of the `frozen` part."""

    @property
    def shapes(self) -> Shapes:
        """Return the target modules of the base model."""
        ...

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        ...

    def load(self, trained: Adapter, frozen: Adapter | None, plan: Plan) -> None:
        """Take the adapter to train (rank r) and the rest of the shared one (rank R−r)."""
        ...

    def train(
        self,
        batches: Iterator[Batch],
        *,
        settings: Training,
        learning_rate: float,
        pruning: Pruning | None,
        on_step: OnStep,
        factors: Trained = "both",
        between: Between | None = None,
    ) -> TrainReport:
        """Run `settings.steps` optimiser steps of `settings.tokens_per_step` tokens each.

        With AdamW a step moves by the gradients of all its micro-batches together; with Adafactor
        by those of each, by its share of the step's tokens. The plan that was loaded says which.
        The factor that is not among `factors` stays as it was loaded. `between` is asked after each
        step but the last, and may have it begin in the middle.
        """
        ...

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over all counted tokens, in nats a token."""
        ...

    def predict(self, batches: Iterable[Batch], top_k: int) -> TopLogits:
        """Return the `top_k` largest logits at each position that is no filler, row after row."""
        ...

    def adapter(self) -> Adapter:
        """Return the trained part as it is now."""
        ...


def step_batches(batches: Iterator[Batch], tokens_per_step: int) -> list[Batch]:
    """Take the micro-batches of one optimiser step: whole ones, until they hold enough tokens."""
    taken: list[Batch] = []
    positions = 0
    while positions < tokens_per_step:
        batch = next(batches)
        positions += batch.ids.size
        taken.append(batch)
    return taken
