"""The training process: the only one that loads torch, and the one the OOM killer would take.

It is a child of the agent and answers one request at a time over a pipe. What a device's memory
plan is about happens here: the floor is measured when libraries, tokenizer and data are in and a
tiny model has been trained once, before the base model is loaded.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.memory import (
    Probe,
    make_peaks_predictable,
    offer_to_oom_killer,
    peak_mib,
    reset_peak,
    resident_mib,
    restrain_libraries,
    return_freed_memory,
)
from edge_client.plan import Plan
from protocol.adapter import Adapter, initial_adapter
from protocol.errors import TunefleetError
from protocol.messages import Pruning, Training

if TYPE_CHECKING:
    from edge_client.data import Batch
    from edge_client.trainer.torch_trainer import TorchTrainer

PROBE_RANK = 8
PROBE_STEPS = 1


@dataclass(frozen=True, slots=True)
class Text:
    """Where the owner's text is and how it is cut."""

    paths: tuple[Path, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class TextReport:
    """What was read: rows of tokens in each split, and what was skipped."""

    train_tokens: int
    held_out_tokens: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What calibration measured for one dtype, in MiB."""

    floor_mib: float
    weights_mib: float
    probes: dict[bool, tuple[Probe, Probe]]
    """Checkpointing → two probes of different length."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the child sends: an answer, an error in words, or (`progress`) something on the way."""

    value: Any = None
    error: TunefleetError | None = None
    crash: str = ""
    progress: bool = False


class Worker:
    """Hold the model, the rows and the trainer of the training process."""

    def __init__(self, progress: Callable[[Any], None]) -> None:
        self._progress = progress
        self._trainer: TorchTrainer | None = None
        self._plan: Plan | None = None
        self._rows: dict[str, list[Any]] = {}
        self._streams: dict[str, Any] = {}
        self._seed = 0
        self._floor = 0.0

    def calibrate(
        self, model: Path, dtype: str, threads: int, seq_len: int, scale: float
    ) -> ProbeReport:
        """Run two probe steps for each way of training with `dtype`; see edge_client.memory."""
        from edge_client.trainer.torch_trainer import TorchTrainer

        self._find_floor(dtype, threads)
        trainer = TorchTrainer(model, dtype=dtype, threads=threads)
        _settle()
        weights = resident_mib() - self._floor
        adapter = initial_adapter(trainer.shapes, PROBE_RANK, scale, seed=0)
        probes = {}
        for checkpointing in (True, False):
            lengths = (max(seq_len // 4, 16), seq_len)
            # The first pass fills caches that stay; the second is what steady training takes.
            for _ in range(2):
                pair = [self._probe(trainer, adapter, n, checkpointing) for n in lengths]
            probes[checkpointing] = (pair[0], pair[1])
        return ProbeReport(self._floor, weights, probes)

    def _probe(
        self, trainer: TorchTrainer, adapter: Adapter, tokens: int, checkpointing: bool
    ) -> Probe:
        plan = Plan(PROBE_RANK, PROBE_RANK, 1, tokens, checkpointing, "", 1, 0.0, 0.0)
        trainer.load(adapter, None, plan)
        _settle()
        reset_peak()
        settings = Training(
            steps=PROBE_STEPS, tokens_per_step=max(16, tokens), max_tokens=max(16, tokens)
        )
        trainer.train(
            _endless(_probe_batch(1, tokens)),
            settings=settings,
            learning_rate=1e-6,
            pruning=None,
            on_step=lambda step, loss: None,
        )
        return Probe(tokens, PROBE_RANK, peak_mib() - self._floor)

    def open(self, model: Path, text: Text, plan: Plan) -> TextReport:
        """Read the text, then load the base model as the plan says."""
        from edge_client.model import load_tokenizer
        from edge_client.trainer.torch_trainer import TorchTrainer

        report = self._read(load_tokenizer(model), text, plan.seq_len)
        self._find_floor(plan.dtype, plan.threads)
        self._plan, self._seed = plan, text.seed
        reset_peak()
        self._trainer = TorchTrainer(model, dtype=plan.dtype, threads=plan.threads)
        return report

    def _read(self, tokenizer: Any, text: Text, seq_len: int) -> TextReport:
        from edge_client.data import pack, read_examples, split_examples, tokenize

        reading = read_examples(text.paths)
        splits = split_examples(reading.examples, seed=text.seed)
        for name in ("train", "trust", "held_out"):
            sequences = tokenize(getattr(splits, name), tokenizer, max_tokens=seq_len)
            self._rows[name] = pack(sequences, seq_len, seed=text.seed)
        return TextReport(
            _tokens(self._rows["train"]),
            _tokens(self._rows["held_out"]),
            tuple(str(problem) for problem in reading.problems),
        )

    def train(
        self,
        stream: str,
        trained: Adapter,
        frozen: Adapter | None,
        settings: Training,
        learning_rate: float,
        pruning: Pruning | None,
    ) -> tuple[Adapter, Any]:
        """Train, reading on where `stream` (the fleet's, or the local comparison's) stopped."""
        from edge_client.data import BatchStream

        trainer, plan = self._ready()
        if stream not in self._streams:
            self._streams[stream] = BatchStream(
                self._rows["train"], plan.micro_batch, seed=self._seed
            )
        trainer.load(trained, frozen, plan)
        report = trainer.train(
            self._streams[stream],
            settings=settings,
            learning_rate=learning_rate,
            pruning=pruning,
            on_step=lambda step, loss: self._progress((step, loss)),
        )
        return trainer.adapter(), report

    def evaluate(self, adapter: Adapter | None, split: str) -> float:
        """Return the loss of the base with `adapter` (None: without) on a split, nats a token."""
        from edge_client.data import evaluation_batches

        trainer, plan = self._ready()
        trainer.load(Adapter({}, 1.0), adapter, plan)
        return trainer.evaluate(evaluation_batches(self._rows[split], plan.micro_batch))

    def memory(self) -> tuple[float, float]:
        """Return the floor, and the peak above it since the base model was loaded, in MiB."""
        return self._floor, peak_mib() - self._floor

    def _ready(self) -> tuple[TorchTrainer, Plan]:
        if self._trainer is None or self._plan is None:
            raise RuntimeError("open comes first")
        return self._trainer, self._plan

    def _find_floor(self, dtype: str, threads: int) -> None:
        """Train a tiny model once, so that code and pools of the libraries are in, and measure."""
        from edge_client.trainer.warm_up import warm_up

        warm_up(dtype, threads)
        _settle()
        self._floor = resident_mib()


def _settle() -> None:
    gc.collect()
    return_freed_memory()


def _tokens(rows: Iterable[Any]) -> int:
    return int(sum((row.labels >= 0).sum() for row in rows))


def _probe_batch(rows: int, seq_len: int) -> Batch:
    import numpy as np

    from edge_client.data import Batch

    ids = np.ones((rows, seq_len), np.int64)
    positions = np.tile(np.arange(seq_len, dtype=np.int64), (rows, 1))
    return Batch(ids, ids.copy(), positions, np.ones_like(ids))


def _endless(batch: Batch) -> Any:
    while True:
        yield batch


def serve(connection: Connection) -> None:
    """Answer requests until the pipe closes: the child's main."""
    offer_to_oom_killer()
    restrain_libraries()
    make_peaks_predictable()
    worker = Worker(lambda value: connection.send(Reply(value, progress=True)))
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            reply = Reply(getattr(worker, name)(**arguments))
        except TunefleetError as error:
            reply = Reply(error=error)
        except KeyboardInterrupt:
            return
        except Exception as error:  # the top of a process: the parent says it in one line
            # The rest stays on this device: what the parent says goes to the broker too.
            traceback.print_exc()
            reply = Reply(crash=type(error).__name__)
        try:
            connection.send(reply)
        except BrokenPipeError:  # the agent has gone: so does its training
            return
