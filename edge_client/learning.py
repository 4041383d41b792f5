"""What a device learns in one round: which directions, how fast, what is cut, what is sent.

This is the algorithm of docs/algorithms.md: directions drawn, remainder frozen, learning rate by
rank, self-pruning. Whoever trains is given to it: `Learner` does so in a process of its own, a
replay makes it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_client.plan import Plan
from edge_client.prune import head_rank, rank_after, tail_product
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter, difference, module_directions, select, without
from protocol.layers import last_blocks, only, to_bitmap
from protocol.messages import Job, Probe
from protocol.probe import TopLogits

OnStep = Callable[[int, float], None]
Train = Callable[[Adapter, Adapter | None], tuple[Adapter, TrainReport]]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a round of training came to."""

    change: Adapter
    """After minus before, of the directions that are kept."""
    rank_trained: int
    rank: int
    """The rank the device goes on with."""
    tail_before: float
    tail_after: float
    report: TrainReport
    held: int
    """Directions that were held while training."""
    directions: Mapping[str, npt.NDArray[np.intp]]
    """Module → those of the held directions that `change` is of, in ascending order."""
    modules: str | None = None
    """The modules that were trained, as they travel; None: all."""

    def pruned(self) -> dict[str, float]:
        """Return what was cut of the rank, and the tails it was decided by; empty: nothing was."""
        if self.rank == self.rank_trained:
            return {}
        return {
            "rank_before": self.rank_trained,
            "rank_after": self.rank,
            "tail_before": self.tail_before,
            "tail_after": self.tail_after,
        }


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a job a training stands."""

    round_number: int
    attempt: int
    drawn_rows: int
    """Rows of the device's text that earlier rounds have drawn: it begins after them."""


class Learning(Protocol):
    """What an agent asks of whoever learns for it: `Learner` trains, a replay makes it up."""

    text: TextReport

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned: ...
    def train_alone(self, *, rank: int, on_step: OnStep) -> tuple[Adapter, TrainReport]: ...
    def train_private(
        self, private: Adapter, shared: Adapter, *, steps: int, on_step: OnStep
    ) -> tuple[Adapter, TrainReport]: ...
    def evaluate(
        self,
        adapter: Adapter | None,
        split: str = "held_out",
        *,
        private: Adapter | None = None,
        weight: float = 1.0,
    ) -> float: ...
    def predict(self, adapter: Adapter, probe: Probe) -> TopLogits: ...
    def memory(self) -> tuple[float, float]: ...
    def use(self, plan: Plan) -> None: ...
    def stop(self) -> None: ...


def learn(
    job: Job,
    device: str,
    held: Adapter,
    rank: int,
    round_number: int,
    train: Train,
    *,
    blocks: int = 0,
) -> Learned:
    """Return what a round comes to: draw directions, train them, cut what they do not need.

    `train` gets the adapter to be trained and the frozen remainder, if the job keeps one. Of the
    modules those of the last `blocks` blocks are trained (0: all); the others are in the remainder.
    """
    chosen = module_directions(
        job.base.modules,
        job.directions,
        job=job.job,
        device=device,
        round_number=round_number,
        rank_trained=rank,
        held=held.rank,
    )
    modules = None
    if blocks:
        mine = last_blocks(job.base.modules, blocks)
        chosen, modules = only(chosen, mine), to_bitmap(job.base.modules, mine)
    received = select(held, chosen)
    frozen = without(held, chosen) if job.remainder == "frozen" else None
    rank = received.rank
    trained, report = train(received, frozen)
    head = head_rank(rank, job.pruning.gamma, job.pruning.rank_min)
    before, after = tail_product(received, head), tail_product(trained, head)
    kept = rank_after(before, after, rank, head) if job.pruning.enabled else rank
    change = difference(trained.truncated(kept), received.truncated(kept))
    directions = {name: at[:kept] for name, at in chosen.items()}
    return Learned(change, rank, kept, before, after, report, held.rank, directions, modules)


def learning_rate(job: Job, rank: int, round_number: int = 1) -> float:
    """Return a device's learning rate in a round: lr·√(R/r) if the job scales it by rank.

    With one scale for the whole fleet a small rank otherwise moves the model less a step. Over the
    rounds it falls evenly from the first to the part of it that the last one has.
    """
    training = job.training
    fallen = min(1.0, (round_number - 1) / max(1, job.rounds - 1))
    rate = training.learning_rate * (1 - (1 - training.learning_rate_last) * fallen)
    return rate * math.sqrt(job.rank / rank) if training.learning_rate_by_rank else rate
