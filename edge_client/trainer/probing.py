"""Probe steps: what each way of training takes on this device, in memory and in time.

A probe goes the way of a round: load, evaluate, load, train. It begins with few tokens, and a
longer one is tried only where what was measured so far says that it stays within the limit.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.memory import MIB, Probe, peak_mib, reset_peak, resident_mib, return_freed_memory
from edge_client.plan import Backend, Plan
from protocol.adapter import Adapter, initial_adapter
from protocol.layers import block_count, last_blocks, within
from protocol.messages import Training

if TYPE_CHECKING:
    from edge_client.trainer.base import Trainer

NO_ADAPTER = Adapter({}, 1.0)
PROBE_RANK, PROBE_HELD = 8, 16
PROBE_STEPS = 2
"""The second has Adam's moments from the first, and is timed."""
BRIEF_S, AGAIN = 1.0, 5
"""A step that takes less is done again, for so long or so many times: the fastest counts."""
LONG_S = 30.0
"""A device whose step takes longer is measured as little as can be: the rest is extrapolated."""
SHORTEST_PROBE = 64
"""Tokens of the first probe; no fewer than a chunk of logits has."""
LIMIT_SHARE = 0.97
"""Share of the limit that a probe may be expected to take."""
STEEPER = 1.15
"""How much steeper than the last two probes the next one is taken to be."""
STEEPEST = 1.5
"""How many times the inputs and outputs of its modules in float32 a token may take."""
THREAD_TOKENS = 64
NEAR = 0.05
"""A count of threads that is slower by less than this share is as good as the fastest."""

FAR = 1.5
"""A count of threads that took so many times what the fastest did is not timed again."""


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """What is to be probed: a model, how it is trained, and what the process may take in all."""

    model: Path
    dtype: str
    base_mib: float
    """What the base's weights are expected to take in that dtype."""
    threads: int
    seq_len: int
    scale: float
    blocks: int = 0
    limit_mib: float = inf
    backend: Backend = "torch"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What calibration measured for one dtype, in MiB."""

    floor_mib: float
    weights_mib: float
    probes: dict[bool, tuple[Probe, ...]]
    """Checkpointing → probes of different length, ascending."""
    limit_mib: float = inf
    """What the process might take in all."""
    complete: bool = True
    """Whether all was probed that is: not so where the limit is too low for it."""


class Prober:
    """Train a base model for a step or two in every way that the limit leaves room for."""

    def __init__(
        self,
        trainer: Trainer,
        task: ProbeTask,
        floor_mib: float,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._trainer, self._task = trainer, task
        self._progress = progress
        self._floor_mib = floor_mib
        self._warm_mib: float | None = None

    def take(self, task: ProbeTask) -> None:
        """Go on with another task of the same model, dtype and backend."""
        self._task = task
        self._trainer.use_threads(task.threads)

    def ways(self, seq_len: int) -> tuple[dict[bool, tuple[Probe, ...]], bool]:
        """Probe with and without checkpointing; return what was measured, and whether it is all.

        The longest probe has two sequences: steps with more rows are extrapolated.
        """
        start_mib = resident_mib() if self._warm_mib is None else self._warm_mib
        found: dict[bool, dict[int, Probe]] = {True: {}, False: {}}
        if self._task.backend == "onnx":  # whose graph keeps what it has computed
            del found[True]
        longest = 2 * seq_len
        for rows, length in _sizes(seq_len):
            tokens = rows * length
            if self._task.backend == "onnx":  # a new arena: it keeps what a shorter probe took
                self._trainer.use_threads(self._task.threads)
            # Kernels of shorter probes stay, which training at one length would not have.
            stale_mib = resident_mib() - start_mib
            for checkpointing, probes in found.items():
                # Where all fits, those between the shortest and whole sequences tell nothing new.
                short = probes and tokens < seq_len and self._fits(checkpointing, found, longest)
                if is_enough(probes) or (short and not is_slow(probes)):
                    continue
                if self._fits(checkpointing, found, tokens):
                    peak, seconds = self._probe(rows, length, checkpointing)
                    probes[tokens] = Probe(
                        tokens, PROBE_RANK, PROBE_HELD, peak - stale_mib - self._floor_mib, seconds
                    )
        enough = {way: tuple(probes.values()) for way, probes in found.items() if len(probes) > 1}
        return enough, all(longest in probes or is_enough(probes) for probes in found.values())

    def warm(self) -> float:
        """Touch every page of the base, which may be mapped; return what is resident then."""
        self._probe(1, 16, True)
        _settle()
        self._warm_mib = resident_mib()
        return self._warm_mib

    def _fits(self, way: bool, found: dict[bool, dict[int, Probe]], tokens: int) -> bool:
        """Say whether a probe of so many tokens is expected to stay within the limit.

        It is by the two longest before it; after one, by the largest slope there may be. The first
        without checkpointing is judged by that with it.
        """
        probes = found[way] or found.get(True)
        if self._task.limit_mib == inf or not probes:
            return True
        *others, last = probes.values()
        if not found[way]:
            more_mib = tokens * self._steepest(way)
        elif not others:
            more_mib = (tokens - last.tokens) * self._steepest(way)
        else:
            slope = (last.peak_mib - others[-1].peak_mib) / (last.tokens - others[-1].tokens)
            more_mib = (tokens - last.tokens) * max(0.0, slope) * STEEPER
        expected_mib = self._floor_mib + last.peak_mib + more_mib
        return expected_mib <= LIMIT_SHARE * self._task.limit_mib

    def _steepest(self, checkpointing: bool) -> float:
        """Return what a token may take at most, MiB: what goes into and out of every module.

        With checkpointing that is of one block and what lies between blocks: of two.
        """
        shapes = self._trainer.shapes
        mib = STEEPEST * sum(d_out + d_in for d_out, d_in in shapes.values()) * 4 / MIB
        return 2 * mib / max(2, block_count(shapes)) if checkpointing else mib

    def _probe(self, rows: int, length: int, checkpointing: bool) -> tuple[float, float]:
        """Do a round of two steps, as a device does; return their peak and a step's time."""
        from edge_client.data import BatchStream, evaluation_batches

        plan = Plan(
            rank=PROBE_RANK,
            held=PROBE_HELD,
            micro_batch=rows,
            seq_len=length,
            checkpointing=checkpointing,
            dtype="",
            threads=1,
            predicted_mib=0.0,
            budget_mib=0.0,
            blocks=self._task.blocks,
        )
        text = [_row(length) for _ in range(rows)]
        _settle()
        self._load(plan, None)
        self._trainer.evaluate(evaluation_batches(text, rows))
        self._progress()
        self._load(plan, PROBE_RANK)
        reset_peak()  # of loading, which is counted: it would hide the step's own
        tokens = rows * length
        marks: list[float] = []

        def on_step(step: int, loss: float) -> None:
            if step < PROBE_STEPS:  # before the mark: the next step's time has none of it
                self._progress()
            marks.append(time.monotonic())

        def train(steps: int) -> None:
            self._trainer.train(
                BatchStream(text, rows, seed=0),
                settings=Training(steps=steps, tokens_per_step=tokens, max_tokens=length),
                learning_rate=1e-6,
                pruning=None,
                on_step=on_step,
            )

        train(PROBE_STEPS)
        peak = peak_mib()
        took = marks[-1] - marks[-2]
        if took < BRIEF_S:  # what others do meanwhile shows in a brief step
            train(min(AGAIN, math.ceil(BRIEF_S / took)))
        self._progress()
        self._trainer.load(NO_ADAPTER, None, plan)
        _settle()
        return peak, min(after - before for before, after in pairwise(marks))

    def _load(self, plan: Plan, rank: int | None) -> None:
        """Load an adapter that is gone afterwards, as one that came over the pipe is."""
        whole = initial_adapter(self._trainer.shapes, PROBE_HELD, self._task.scale, seed=0)
        if rank is None:
            self._trainer.load(NO_ADAPTER, whole, plan)
        else:
            modules = last_blocks(self._trainer.shapes, plan.blocks)
            rest = {
                n: f.take(slice(rank if n in modules else 0, None)) for n, f in whole.layers.items()
            }
            mine = within(whole.truncated(rank), modules)
            self._trainer.load(mine, Adapter(rest, self._task.scale), plan)
            del rest, mine
        del whole
        _settle()

    def threads(self, most: int) -> int:
        """Return the fewest threads that train about as fast as any number up to `most`.

        Where others use the cores, as many threads as cores wait for each other: then fewer are
        as fast, and leave the others more.
        """
        counts = sorted({most, most - 1, most // 2, 1} - {0}, reverse=True)
        if len(counts) == 1:
            return most
        took = dict.fromkeys(counts, inf)
        for _ in range(2):  # in turn, so that a moment's load of others is not held against one
            for count in worth_timing(took):
                self._trainer.use_threads(count)
                _, seconds = self._probe(1, THREAD_TOKENS, True)
                took[count] = min(took[count], seconds)
                if seconds > LONG_S:
                    return fewest_near_fastest(took)
        return fewest_near_fastest(took)


def is_slow(probes: dict[int, Probe]) -> bool:
    """Say whether a step of one of the probes took very long."""
    return any(probe.seconds > LONG_S for probe in probes.values())


def is_enough(probes: dict[int, Probe]) -> bool:
    """Say whether there are two probes, as a line needs, and another would take very long."""
    return len(probes) > 1 and is_slow(probes)


def worth_timing(took: dict[int, float]) -> list[int]:
    """Return the counts of threads whose step is to be timed, or timed again.

    A moment's load does not decide over steps that take long, nor over counts far from the fastest.
    """
    fastest = min(took.values())
    if fastest == inf:
        return list(took)
    return [n for n, s in took.items() if s <= FAR * fastest] if fastest < BRIEF_S else []


def fewest_near_fastest(took: dict[int, float]) -> int:
    """Return the fewest threads whose step takes no longer than the fastest's and a little."""
    return min(count for count, s in took.items() if s <= min(took.values()) * (1 + NEAR))


def _sizes(seq_len: int) -> list[tuple[int, int]]:
    """Return rows and length of each probe, ascending in tokens: the last two are steady."""
    sizes: list[tuple[int, int]] = []
    length = SHORTEST_PROBE
    while length < seq_len:
        sizes.append((1, length))
        length *= 2
    return [*sizes, (1, seq_len), (2, seq_len)]


def _row(tokens: int) -> Any:
    import numpy as np

    from edge_client.data.pack import PackedRow

    ids = np.ones(tokens, np.int32)
    return PackedRow(ids, ids, np.arange(tokens, dtype=np.int32), ids)


def _settle() -> None:
    gc.collect()
    return_freed_memory()
