"""Choose how a device trains: the largest rank that its memory holds, then the fastest way.

Pure: the budget and the measured constants come in, the plan comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Literal

from edge_client.errors import NoPlanFits
from edge_client.memory import Activations, Way, predict_mib
from protocol.adapter import Shapes
from protocol.messages import Training

Backend = Literal["torch", "onnx"]
MICRO_BATCHES = (1, 2, 4, 8, 16)
SHORTEST_TOKENS = 64
RESERVE_SHARE = 0.05
"""Share of a device's memory that is left alone, for what else runs on it."""
HEAP_MIB = 2.0
"""By what runs of one plan differ whatever the model: fragments of the heap, oneDNN's kernels."""
HEADROOM_SHARE = 0.1
"""Share of a prediction, without its fixed part, by which the peak may be above it besides.

Larger micro-batches than the probed ones are extrapolated; `benchmarks/memory.py` measures how far
peaks lie from predictions."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on this device for one model: constants of the memory model."""

    floor_mib: float
    weights_mib: dict[str, float]
    """dtype → base weights as they lie in memory."""
    activations: dict[Way, Activations]


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
    backend: Backend = "torch"

    @property
    def way(self) -> Way:
        return Way(self.dtype, self.checkpointing)

    def __str__(self) -> str:
        way = f"{self.dtype}, checkpointing" if self.checkpointing else self.dtype
        rank = f"rank {self.rank} of {self.held} held"
        if self.blocks:
            rank += f" in the last {self.blocks} block{'s' if self.blocks > 1 else ''}"
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
    shapes: Shapes,
    calibration: Calibration,
    *,
    budget_mib: float,
    memory_scale: float = 1.0,
    ladder: Sequence[int],
    shared_rank: int,
    training: Training,
    native_bf16: bool,
    threads: int,
    below_mib: float = inf,
    private_rank: int = 0,
    blocks: int = 0,
) -> Plan:
    """Return the best plan for a process that may take `budget_mib` in all.

    Its predicted peak, with a headroom, is within the budget, and is smaller than `below_mib`:
    the prediction of a plan that was too large for the kernel. It is the larger of two where the
    device trains an adapter of `private_rank` too, beside all that it holds. With `blocks` the last
    so many are trained; the calibration is one of that.

    A device that can hold the whole shared adapter does (`shared_rank`; 0 when the job drops the
    remainder): training in its context is worth more than rank. Then comes the largest rank; at
    one rank the dtype the CPU is fast in, no checkpointing, the larger micro-batch. Sequences are
    cut only when even the smallest rank does not fit with whole ones.

    So more memory never gives a worse plan in that order. It can give a smaller rank: a device that
    can just hold the whole shared adapter trains less of it than it could have without holding it.

    Raises:
        NoPlanFits: nothing fits; says what the smallest would take.
    """

    budgets = {
        way: budget_above_floor(
            budget_mib, calibration.floor_mib, max(0.0, measured.fixed_mib), memory_scale
        )
        for way, measured in calibration.activations.items()
    }

    def needs_mib(plan: Plan) -> float:
        return plan.predicted_mib + headroom_mib(
            plan.predicted_mib, calibration.activations[plan.way].fixed_mib
        )

    def preference(plan: Plan) -> tuple[object, ...]:
        fast = plan.dtype == ("bf16" if native_bf16 else "f32")
        whole = plan.held >= shared_rank
        return whole, plan.rank, plan.held, fast, not plan.checkpointing, plan.micro_batch

    least = (inf, 0.0)
    seq_len = training.max_tokens
    while seq_len >= min(SHORTEST_TOKENS, training.max_tokens):
        every = [
            plan
            for way, budget in budgets.items()
            for plan in _candidates(
                shapes, calibration, way, budget, seq_len,
                ladder=ladder, shared_rank=shared_rank, training=training, threads=threads,
                private_rank=private_rank, blocks=blocks,
            )
        ]  # fmt: skip
        least = min(least, *((needs_mib(plan), plan.budget_mib) for plan in every))
        fitting = [
            plan
            for plan in every
            if needs_mib(plan) <= plan.budget_mib and plan.predicted_mib < below_mib
        ]
        if fitting:
            return max(fitting, key=preference)
        seq_len //= 2
    raise NoPlanFits(_why_none(calibration, *least, below_mib))


def _candidates(
    shapes: Shapes,
    calibration: Calibration,
    way: Way,
    budget_mib: float,
    seq_len: int,
    *,
    ladder: Sequence[int],
    shared_rank: int,
    training: Training,
    threads: int,
    private_rank: int,
    blocks: int,
) -> Iterator[Plan]:
    """Yield every plan of one way and length, with its prediction, whether it fits or not."""
    for rank in ladder:
        for held in [h for h in ladder if rank <= h <= shared_rank] or [rank]:
            for micro_batch in MICRO_BATCHES:
                tokens = micro_batch * seq_len
                if micro_batch > 1 and tokens > training.tokens_per_step:
                    break
                trained = [(rank, held)]
                if private_rank:
                    trained.append((private_rank, held + private_rank))
                predicted_mib = max(
                    predict_mib(
                        shapes,
                        weights_mib=calibration.weights_mib[way.dtype],
                        activations=calibration.activations[way],
                        way=way,
                        rank=own,
                        held=whole,
                        tokens=tokens,
                        accumulates=tokens < training.tokens_per_step,
                        blocks=blocks,
                    )
                    for own, whole in trained
                )
                yield Plan(
                    rank=rank,
                    held=held,
                    micro_batch=micro_batch,
                    seq_len=seq_len,
                    checkpointing=way.checkpointing,
                    dtype=way.dtype,
                    threads=threads,
                    predicted_mib=predicted_mib,
                    budget_mib=budget_mib,
                    blocks=blocks,
                )


def _why_none(
    calibration: Calibration, least_mib: float, budget_mib: float, below_mib: float
) -> str:
    """Say why there is no plan; the smallest would take `least_mib` above the floor."""
    if below_mib < inf:
        return (
            f"a plan of {below_mib:.0f} MiB above the floor was too much for this device, and no "
            "smaller one is left; free memory, or take a smaller base model"
        )
    there = f"{budget_mib:.0f} MiB there" if budget_mib > 0 else "nothing there"
    return (
        f"the smallest plan needs {least_mib:.0f} MiB above a floor of "
        f"{calibration.floor_mib:.0f} MiB, this device has {there}; free memory, raise "
        "--memory-cap if it is given, or take a smaller base model"
    )
