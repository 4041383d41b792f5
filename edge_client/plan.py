"""Choose how a device trains: the largest rank that its memory holds, then the fastest way.

Pure: the budget and the measured constants come in, every plan there is and the best come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import ceil, inf
from typing import Literal

from edge_client.errors import NoPlanFits
from edge_client.memory import Activations, Optimizer, Way, optimizers_of, predict_mib
from edge_client.wanted import Wanted
from protocol.layers import block_count
from protocol.messages import Training

Backend = Literal["torch", "onnx"]
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
STEP_DOWN = 0.95
"""Of the prediction that was too much, what the next plan's may be: a hair less would be too."""
OVERRUN = 1.125
"""How many times a step's tokens its micro-batches, which are whole, may hold."""
SHORTEST_TOKENS = 64
RESERVE_SHARE = 0.05
"""Share of a device's memory that is left alone, for what else runs on it."""
HEAP_MIB = 2.0
"""By what runs of one plan differ whatever the model: fragments of the heap, oneDNN's kernels."""
HEADROOM_SHARE = 0.1
"""Share of a prediction, without its fixed part, by which the peak may be above it besides.

Larger micro-batches than the probed ones are extrapolated; `benchmarks/memory_plan.py` measures
how far peaks lie from predictions."""

CHECKPOINTED = (0.25, 0.5, 0.75)
"""Shares of the blocks that may be made again, beside none and all."""
ROOM_SHARE, ROOM_MIB = 0.25, 16.0
"""By how much of its prediction, and by how much more, a budget is above a plan with room."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on this device for one model: constants of the memory model."""

    floor_mib: float
    weights_mib: dict[str, float]
    """dtype → base weights as they lie in memory."""
    activations: dict[Way, Activations]
    tokens_s: dict[Way, float]
    """Tokens trained in a second by each way, in its probes."""
    backend: Backend = "torch"
    counted_mib: Mapping[str, float] = field(default_factory=dict)
    """dtype → the base's numbers alone: what `weights_mib` has beyond them is not the model's."""

    def beside_weights_mib(self, dtype: str) -> float:
        """Return what kernels and the like take of `weights_mib`, which depends on no model."""
        return max(0.0, self.weights_mib[dtype] - self.counted_mib.get(dtype, inf))


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train: sizes that fit the budget, and the prediction they rest on."""

    rank: int
    """Directions that the device trains."""
    held: int
    """Directions of the shared adapter that it holds: the others are its frozen remainder."""
    micro_batch: int
    seq_len: int
    checkpointing: bool
    dtype: str
    threads: int
    predicted_mib: float
    """Predicted peak above the floor."""
    budget_mib: float
    """What may be used above the floor."""
    blocks: int = 0
    """The last so many blocks are trained; 0: all."""
    predicted_tokens_s: float = 0.0
    """Positions trained in a second, by the probes' speed."""
    needs_mib: float = 0.0
    """Predicted peak above the floor with the headroom that is kept free."""
    checkpoint_blocks: int = 0
    """With checkpointing, the first so many blocks are made again; 0: all."""
    backend: Backend = "torch"
    """What trains: edge_client.trainer.backend."""
    optimizer: Optimizer = "adamw"
    """What moves the factors: Adafactor keeps nothing between steps, and leaves room for rank."""
    why_backend: str = field(default="", compare=False)
    floor_mib: float = field(default=0.0, compare=False)
    """What libraries and data take before the model is loaded: the whole process takes both."""

    @property
    def way(self) -> Way:
        return Way(self.dtype, self.checkpointing)

    @property
    def has_room(self) -> bool:
        """Say whether memory that is freed may be kept for speed, which no probe has measured."""
        return self.budget_mib >= (1 + ROOM_SHARE) * self.predicted_mib + ROOM_MIB

    def __str__(self) -> str:
        way = f"{self.dtype}, checkpointing" if self.checkpointing else self.dtype
        if self.checkpointing and self.checkpoint_blocks:
            way += f" {self.checkpoint_blocks} blocks"
        rank = f"rank {self.rank} of {self.held} held"
        if self.blocks:
            rank += f" in the last {self.blocks} block{'s' if self.blocks > 1 else ''}"
        if self.optimizer == "adafactor":
            rank += " without Adam's moments"
        backend = "" if self.backend == "torch" else f", {self.backend}"
        return f"{rank}, {self.micro_batch}×{self.seq_len} tokens, {way}{backend}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def memory_budget(
    *, total_mib: float, available_mib: float, limit_mib: float | None, cap_mib: float | None
) -> float:
    """Return what a training process may take in all, its floor included.

    min(available, cgroup limit) less a reserve of the device's memory, and no more than the owner's
    cap, of which nothing is taken off.
    """
    has_mib = min(total_mib, inf if limit_mib is None else limit_mib)
    gives_mib = max(0.0, min(available_mib, has_mib) - RESERVE_SHARE * has_mib)
    return gives_mib if cap_mib is None else min(gives_mib, cap_mib)


def budget_above_floor(
    budget_mib: float, floor_mib: float, fixed_mib: float, memory_scale: float = 1.0
) -> float:
    """Return what of a budget is left above the floor, its model-dependent part scaled.

    A replay with a small base model divides the model-dependent part of a recorded device's
    memory by `memory_scale`, so that the small model stands to it as SmolLM2-135M would. What
    the libraries' buffers and the heap take with any model (`fixed_mib`, HEAP_MIB) is not divided.
    """
    undivided = fixed_mib + HEAP_MIB
    return undivided + (budget_mib - floor_mib - undivided) / memory_scale


def headroom_mib(predicted_mib: float, fixed_mib: float) -> float:
    """Return how much of the budget a plan leaves free above its prediction."""
    return HEAP_MIB + HEADROOM_SHARE * (predicted_mib - fixed_mib)


def choose_plan(
    wanted: Wanted,
    calibration: Calibration,
    *,
    budget_mib: float,
    threads: int,
    memory_scale: float = 1.0,
    below_mib: float = inf,
) -> Plan:
    """Return the best plan for a process that may take `budget_mib` in all.

    Its predicted peak, with a headroom, is within the budget, and is smaller than `below_mib`, by
    some where it can be: the prediction of a plan that was too large for the kernel. It is the
    larger of two where the device trains an adapter of its own too. Which is best: `preference`.
    Sequences are cut only when even the smallest rank does not fit with whole ones.

    So more memory never gives a worse plan in that order. It can give a smaller rank: a device that
    can just hold the whole shared adapter trains less of it than it could have without holding it.

    Raises:
        NoPlanFits: nothing fits, in memory or in what may be transferred; says what the smallest
            would take.
    """
    least = (inf, 0.0)
    for seq_len in sequence_lengths(wanted.training.max_tokens):
        every = all_plans(
            wanted,
            calibration,
            seq_len,
            budget_mib=budget_mib,
            threads=threads,
            memory_scale=memory_scale,
        )
        least = min([least, *((plan.needs_mib, plan.budget_mib) for plan in every)])
        fitting = [plan for plan in every if fits(plan) and plan.predicted_mib < below_mib]
        clearly = [plan for plan in fitting if plan.predicted_mib <= STEP_DOWN * below_mib]
        if fitting:
            return max(clearly or fitting, key=lambda plan: preference(plan, wanted.shared_rank))
    needs_mib, above_mib = least
    cap_mib = budget_mib + (needs_mib - above_mib) * memory_scale
    raise NoPlanFits(_why_none(calibration, budget_mib, needs_mib, above_mib, cap_mib, below_mib))


def fits(plan: Plan) -> bool:
    """Say whether a plan's peak, with its headroom, is within its budget."""
    return plan.needs_mib <= plan.budget_mib


def preference(plan: Plan, shared_rank: int) -> tuple[object, ...]:
    """Order plans of one length, best last.

    A device that can hold the whole shared adapter does: training in its context is worth more than
    rank. Then comes the largest rank, what is held beside it, and at equal ones Adam's moments, and
    the tokens that are trained in a second, by measurement; where these are equal too, the larger
    micro-batch.
    """
    whole, adam = plan.held >= shared_rank, plan.optimizer == "adamw"
    speed = plan.predicted_tokens_s
    return whole, plan.rank, plan.held, adam, speed, plan.micro_batch, not plan.checkpointing


def sequence_lengths(max_tokens: int) -> Iterator[int]:
    """Yield the lengths to which sequences may be cut, whole ones first."""
    length = max_tokens
    while length >= min(SHORTEST_TOKENS, max_tokens):
        yield length
        length //= 2


def micro_batches(training: Training, seq_len: int) -> list[int]:
    """Return the rows of `seq_len` tokens that may be trained at a time.

    A step's micro-batches are whole: those of which they would hold many tokens more than the job
    wants in a step are left out.
    """
    rows = max(1, training.tokens_per_step // seq_len)
    return [n for n in MICRO_BATCHES if n <= rows and -(-rows // n) * n <= rows * OVERRUN]


def all_plans(
    wanted: Wanted,
    calibration: Calibration,
    seq_len: int,
    *,
    budget_mib: float,
    threads: int,
    memory_scale: float = 1.0,
) -> list[Plan]:
    """Return every plan of one sequence length, with its predictions, whether it fits or not."""
    found: list[Plan] = []
    adapters = wanted.adapters
    for way, measured in calibration.activations.items():
        fixed_mib = max(0.0, measured.fixed_mib) + calibration.beside_weights_mib(way.dtype)
        above_mib = budget_above_floor(budget_mib, calibration.floor_mib, fixed_mib, memory_scale)
        for (rank, held), optimizer in product(adapters, optimizers_of(wanted.training)):
            for micro_batch in micro_batches(wanted.training, seq_len):
                tokens = micro_batch * seq_len
                mib = _predicted_mib(wanted, calibration, way, rank, held, tokens, optimizer)
                found.append(
                    Plan(
                        rank=rank,
                        held=held,
                        micro_batch=micro_batch,
                        seq_len=seq_len,
                        checkpointing=way.checkpointing,
                        dtype=way.dtype,
                        threads=threads,
                        predicted_mib=mib,
                        budget_mib=above_mib,
                        blocks=wanted.blocks,
                        predicted_tokens_s=calibration.tokens_s[way],
                        needs_mib=mib + headroom_mib(mib, measured.fixed_mib),
                        backend=calibration.backend,
                        optimizer=optimizer,
                        floor_mib=calibration.floor_mib,
                    )
                )
    return found + list(_partly_checkpointed(wanted, found))


def _partly_checkpointed(wanted: Wanted, found: Sequence[Plan]) -> Iterator[Plan]:
    """Yield what lies between plans with and without checkpointing: some blocks are made again.

    A step's largest moments are lines in the number of those blocks, so their maximum is convex,
    and the line between none and all of them is at least as much. So is the time of a token.
    """
    count = block_count(wanted.shapes)
    without = {_sizes(plan): plan for plan in found if not plan.checkpointing}
    for every in (plan for plan in found if plan.checkpointing and not plan.blocks):
        none = without.get(_sizes(every))
        if none is None:
            continue
        for blocks in sorted({round(count * part) for part in CHECKPOINTED} - {0, count}):
            yield _between(none, every, blocks, blocks / count)


def _between(none: Plan, every: Plan, blocks: int, share: float) -> Plan:
    """Return the plan that makes a share of the blocks again, by those of none and of all."""

    def mix(at_none: float, at_all: float) -> float:
        return (1 - share) * at_none + share * at_all

    speeds = none.predicted_tokens_s, every.predicted_tokens_s
    return replace(
        every,
        checkpoint_blocks=blocks,
        predicted_mib=mix(none.predicted_mib, every.predicted_mib),
        budget_mib=mix(none.budget_mib, every.budget_mib),
        needs_mib=mix(none.needs_mib, every.needs_mib),
        predicted_tokens_s=1 / mix(*(1 / s for s in speeds)) if all(speeds) else 0.0,
    )


def _sizes(plan: Plan) -> tuple[object, ...]:
    return plan.dtype, plan.rank, plan.held, plan.micro_batch, plan.optimizer


def _predicted_mib(
    wanted: Wanted,
    calibration: Calibration,
    way: Way,
    rank: int,
    held: int,
    tokens: int,
    optimizer: Optimizer,
) -> float:
    """Return the peak above the floor: of the private adapter's training, if that is larger."""
    trained = [(rank, held)]
    if wanted.private_rank:
        trained.append((wanted.private_rank, held + wanted.private_rank))
    return max(
        predict_mib(
            wanted.shapes,
            weights_mib=calibration.weights_mib[way.dtype],
            activations=calibration.activations[way],
            way=way,
            rank=own,
            held=whole,
            tokens=tokens,
            accumulates=tokens < wanted.training.tokens_per_step,
            blocks=wanted.blocks,
            keeps=calibration.backend == "onnx",  # its arena
            optimizer=optimizer,
        )
        for own, whole in trained
    )


def _why_none(
    calibration: Calibration,
    total_mib: float,
    least_mib: float,
    budget_mib: float,
    cap_mib: float,
    below_mib: float,
) -> str:
    """Say why there is no plan; the smallest would take `least_mib` above the floor.

    `budget_mib` is there for it. It would fit a process that may take `cap_mib` in all.
    """
    if not calibration.activations and not calibration.floor_mib:  # it was ended before
        return (
            f"the libraries alone take more than the {total_mib:.0f} MiB that there are; free "
            "memory, raise --memory-cap if it is given, or train without PyTorch"
        )
    if not calibration.activations:
        return (
            f"a training step takes more than the {total_mib:.0f} MiB that there are (a floor of "
            f"{calibration.floor_mib:.0f} MiB and a base of {_lightest(calibration):.0f} MiB "
            "before it begins); free memory, raise --memory-cap if it is given, or take a smaller "
            "base model"
        )
    if below_mib < inf:
        return (
            f"a plan of {below_mib:.0f} MiB above the floor was too much for this device, and no "
            "smaller one is left; free memory, or take a smaller base model"
        )
    there = f"{budget_mib:.0f} MiB there" if budget_mib > 0 else "nothing there"
    return (
        f"the smallest plan needs {least_mib:.0f} MiB above a floor of "
        f"{calibration.floor_mib:.0f} MiB, this device has {there}; free memory, give "
        f"--memory-cap {ceil(cap_mib)} at least if it is given, or take a smaller base model"
    )


def _lightest(calibration: Calibration) -> float:
    return min(calibration.weights_mib.values())
