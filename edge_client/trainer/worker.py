"""The training process: the only one that loads a backend, and the one the OOM killer would take.

It is a child of the agent and answers one request at a time over a pipe. What a device's memory
plan is about happens here: the floor is measured when libraries, tokenizer and data are in and a
tiny model has been trained once, before the base model is loaded.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edge_client.errors import DataError, TrainingDiverged, TrainingPaused
from edge_client.memory import (
    keep_freed_memory,
    make_peaks_predictable,
    offer_to_oom_killer,
    peak_mib,
    reset_peak,
    resident_mib,
    restrain_libraries,
    return_freed_memory,
)
from edge_client.plan import Backend, Plan
from edge_client.trainer.backend import open_tokenizer, open_trainer, warm_up
from edge_client.trainer.base import TrainReport
from edge_client.trainer.checkpoint import Checkpoints, Keeping, forget, read_kept
from edge_client.trainer.pipe import ask, receive, send
from edge_client.trainer.probing import NO_ADAPTER, Prober, ProbeReport, ProbeTask
from protocol.adapter import Adapter
from protocol.errors import TunefleetError
from protocol.factors import Trained
from protocol.messages import Probe as PublicProbe
from protocol.messages import Pruning, Training
from protocol.probe import TopLogits

if TYPE_CHECKING:
    from edge_client.trainer.base import Trainer

T = TypeVar("T")


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
    histogram: tuple[int, ...] = ()
    """Training tokens in each bucket of `protocol.metrics`."""


OUT_OF_MEMORY = "out of memory"
"""The crash of a request for which the system gave no memory, without killing the process."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the child sends: an answer, an error in words, or (`progress`) something on the way.

    Progress is answered: the child waits to hear whether it is to pause.
    """

    value: Any = None
    error: TunefleetError | None = None
    crash: str = ""
    progress: bool = False


class Worker:
    """Hold the model, the rows and the trainer of the training process."""

    def __init__(self, progress: Callable[[Any], bool]) -> None:
        self._progress = progress
        """Tell the agent, and hear whether to pause."""
        self._trainer: Trainer | None = None
        self._plan: Plan | None = None
        self._tokenizer: Any = None  # kept: it is part of the floor
        self._rows: dict[str, list[Any]] = {}
        self._streams: dict[str, Any] = {}
        self._seed = 0
        self._floor = 0.0
        self._prober: tuple[Prober | None, float] | None = None

    def calibrate(self, task: ProbeTask) -> ProbeReport:
        """Probe each way of training, as far as the task's limit leaves room."""
        prober, weights_mib = self._probing(task)
        if prober is None:
            return ProbeReport(self._floor, weights_mib, {}, task.limit_mib, complete=False)
        probes, complete = prober.ways(task.seq_len)
        return ProbeReport(self._floor, weights_mib, probes, task.limit_mib, complete)

    def choose_threads(self, task: ProbeTask) -> int | None:
        """Return how many threads train fastest here, up to the task's; None: no memory to try."""
        prober, _ = self._probing(task)
        return None if prober is None else prober.threads(task.threads)

    def _probing(self, task: ProbeTask) -> tuple[Prober | None, float]:
        """Return what probes, and the base's weights in MiB: once for all tasks of one dtype."""
        if self._prober is None:
            self._prober = self._open_prober(task)
        prober, _ = self._prober
        if prober is not None:
            prober.take(task)
        return self._prober

    def _open_prober(self, task: ProbeTask) -> tuple[Prober | None, float]:
        """Return what probes, None where the base alone is too large, and its weights in MiB."""
        backend = task.backend
        self._tokenizer = open_tokenizer(backend, task.model)
        self._go_on()
        self._find_floor(backend, task.dtype, task.threads)
        self._go_on()
        if self._floor + task.base_mib > task.limit_mib:
            return None, task.base_mib
        self._trainer = open_trainer(backend, task.model, dtype=task.dtype, threads=task.threads)
        self._go_on()
        prober = Prober(self._trainer, task, self._floor, self._go_on)
        return prober, prober.warm() - self._floor

    def open(self, model: Path, text: Text, plan: Plan) -> TextReport:
        """Read the text, then load the base model, a folder of the plan's backend.

        What was opened before is gone.
        """
        self._trainer, self._rows, self._streams = None, {}, {}
        self._tokenizer = open_tokenizer(plan.backend, model)
        self._go_on()
        report = self._read(self._tokenizer, text, plan.seq_len)
        self._find_floor(plan.backend, plan.dtype, plan.threads)
        self._go_on()
        self._plan, self._seed = plan, text.seed
        self._trainer = open_trainer(plan.backend, model, dtype=plan.dtype, threads=plan.threads)
        _settle()
        if plan.has_room:
            keep_freed_memory()
        reset_peak()  # of the base's file, whose pages the kernel can take back; see memory.py
        return report

    def _read(self, tokenizer: Any, text: Text, seq_len: int) -> TextReport:
        from edge_client.data import (
            label_histogram,
            pack,
            read_examples,
            split_examples,
            tokenize,
        )

        reading = read_examples(text.paths, self._go_on)
        splits = split_examples(reading.examples, seed=text.seed, problems=reading.problems)
        for name in ("train", "trust", "held_out"):
            examples = getattr(splits, name)
            sequences = tokenize(examples, tokenizer, max_tokens=seq_len, progress=self._go_on)
            self._rows[name] = pack(sequences, seq_len, seed=text.seed)
        return TextReport(
            _tokens(self._rows["train"]),
            _tokens(self._rows["held_out"]),
            tuple(str(problem) for problem in reading.problems),
            label_histogram(self._rows["train"]),
        )

    def load(self, trained: Adapter | None, frozen: Adapter | None) -> None:
        """Put adapters on the base model.

        A request of its own: what came over the pipe is gone before training or evaluating starts.
        """
        trainer, plan = self._ready()
        trainer.load(trained or NO_ADAPTER, frozen, plan)

    def train(
        self,
        stream: str,
        settings: Training,
        learning_rate: float,
        pruning: Pruning | None,
        sampling: bool = False,
        factors: Trained = "both",
        keeping: Keeping | None = None,
        drawn_rows: int | None = None,
    ) -> tuple[Adapter, TrainReport]:
        """Train `factors` of what is loaded, reading on where `stream` stopped; then unload it.

        A stream is the fleet's, or the local comparison's. It stopped at `drawn_rows`, where the
        agent has kept that; else where this process has left it. With `sampling` the loss on some
        of the training text, as much as a step takes, is measured before and after. With `keeping`
        it goes on from what is kept of it, and pauses when the agent says so.

        Raises:
            TrainingPaused: it has; what it had loaded is unloaded.
            TrainingDiverged: its loss is not finite; nothing of it is kept.
        """
        from edge_client.data import BatchStream, step_sample

        trainer, plan = self._ready()
        rows = self._rows["train"]
        kept, left = read_kept(keeping, rows, plan.micro_batch) if keeping else (None, None)
        if left is not None:
            self._streams[stream] = left
        elif drawn_rows is not None or stream not in self._streams:
            self._streams[stream] = BatchStream(
                rows, plan.micro_batch, seed=self._seed, drawn_rows=drawn_rows or 0
            )
        batches = self._streams[stream]
        sample = step_sample(rows, settings.tokens_per_step)
        before = kept.loss_before if kept else self._loss(sample) if sampling else None
        pausing = False

        def on_step(step: int, loss: float) -> None:
            nonlocal pausing
            if not math.isfinite(loss):
                raise TrainingDiverged(_diverged(f"in step {step}", loss, learning_rate))
            pausing = self._progress((step, loss))

        between = None
        if keeping is not None:
            between = Checkpoints(
                keeping, kept, batches.state, lambda: pausing, before, self._progress
            )
        try:
            report = trainer.train(
                batches,
                settings=settings,
                learning_rate=learning_rate,
                pruning=pruning,
                on_step=on_step,
                factors=factors,
                between=between,
            )
            if before is not None:
                after = self._loss(sample)
                if not math.isfinite(after):
                    raise TrainingDiverged(_diverged("by its end", after, learning_rate))
                report = replace(report, sample_losses=(before, after))
        except (TrainingPaused, TrainingDiverged) as error:
            if keeping is not None and isinstance(error, TrainingDiverged):
                forget(keeping.path.parent)
            self._unload()
            raise
        adapter = trainer.adapter()
        self._unload()
        return adapter, replace(report, drawn_rows=batches.state()["drawn_rows"])

    def evaluate(self, split: str) -> float:
        """Return the loss on a split of the base with what is loaded; then unload it."""
        loss = self._loss(self._rows[split])
        self._unload()
        return loss

    def _loss(self, rows: list[Any]) -> float:
        from edge_client.data import evaluation_batches

        trainer, plan = self._ready()
        # Without gradients twice the rows take less than a training step of all blocks.
        at_once = plan.micro_batch * (1 if plan.blocks else 2)
        return trainer.evaluate(self._telling(evaluation_batches(rows, at_once)))

    def _telling(self, batches: Iterator[T]) -> Iterator[T]:
        """Let the agent hear that an evaluation goes on: it may take longer than a step."""
        for batch in batches:
            self._progress(None)
            yield batch

    def _go_on(self) -> None:
        """Let the agent hear that measuring or reading goes on: either may take long."""
        self._progress(None)

    def predict(self, probe: PublicProbe, window: int) -> TopLogits:
        """Return the largest logits of what is loaded on a public text; then unload it."""
        from edge_client.data import text_batches

        trainer, plan = self._ready()
        ids = self._tokenizer(probe.text, add_special_tokens=False, verbose=False)["input_ids"]
        positions = min(probe.positions, len(ids) - 1)
        if positions < 1:
            raise DataError("the job's probe is a text of one token: there is nothing to predict")
        size = {"seq_len": plan.seq_len, "micro_batch": plan.micro_batch}
        answer = trainer.predict(text_batches(ids[:positions], window=window, **size), probe.top_k)
        self._unload()
        return answer

    def _unload(self) -> None:
        """Leave the base model alone, so that the next adapters don't arrive beside the last."""
        trainer, plan = self._ready()
        trainer.load(NO_ADAPTER, None, plan)

    def memory(self) -> tuple[float, float]:
        """Return the floor, and the peak above it since the base model was loaded, in MiB."""
        return self._floor, peak_mib() - self._floor

    def _ready(self) -> tuple[Trainer, Plan]:
        if self._trainer is None or self._plan is None:
            raise RuntimeError("open comes first")
        return self._trainer, self._plan

    def _find_floor(self, backend: Backend, dtype: str, threads: int) -> None:
        """Have the libraries load their code and start their pools, and measure."""
        warm_up(backend, dtype, threads)
        gc.collect()
        gc.freeze()  # a million objects of the libraries, which no collection need walk again
        _settle()
        self._floor = resident_mib()


def _diverged(when: str, loss: float, learning_rate: float) -> str:
    return (
        f"training diverged {when}: its loss is {loss}; a learning rate of {learning_rate:g} is "
        "too high for this device's text"
    )


def _settle() -> None:
    gc.collect()
    return_freed_memory()


def _tokens(rows: Iterable[Any]) -> int:
    return int(sum((row.labels >= 0).sum() for row in rows))


def serve(connection: Connection) -> None:
    """Answer requests until the pipe closes: the child's main."""
    offer_to_oom_killer()
    restrain_libraries()
    make_peaks_predictable()
    threading.Thread(target=end_with_agent, name="agent", daemon=True).start()
    worker = Worker(lambda value: ask(connection, Reply(value, progress=True)))
    while True:
        try:
            reply = _answer(worker, receive(connection))
            return_freed_memory()
            send(connection, reply)
            del reply
        except (EOFError, KeyboardInterrupt, BrokenPipeError):
            return  # the agent has gone: so does its training


def end_with_agent() -> None:
    """End in the middle of a step or of measuring, which can take hours, once the agent is dead."""
    agent = multiprocessing.parent_process()
    assert agent is not None, "the child's main"
    agent.join()
    os._exit(1)


def _answer(worker: Worker, request: tuple[str, dict[str, Any]]) -> Reply:
    name, arguments = request
    try:
        return Reply(getattr(worker, name)(**arguments))
    except TunefleetError as error:
        return Reply(error=error)
    except Exception as error:  # the top of a process: the parent says it in one line
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return Reply(crash=OUT_OF_MEMORY)
        # The rest stays on this device: what the parent says goes to the broker too.
        traceback.print_exc()
        return Reply(crash=type(error).__name__)
