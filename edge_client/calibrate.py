"""Measure the memory model's constants once on this device, and remember them.

The cache is keyed by what the constants depend on: backend, the model's hash, the dtype, the
length, the number of threads and the versions of the libraries. Several agents on one machine
measure once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from edge_client.errors import WorkerError, WorkerKilled
from edge_client.memory import FROZEN_BYTES, MIB, Probe, Way, fit
from edge_client.plan import Backend, Calibration
from edge_client.storage import keeping
from edge_client.trainer.backend import LIBRARIES
from edge_client.trainer.probing import THREAD_TOKENS, ProbeReport, ProbeTask
from edge_client.trainer.process import TrainingProcess
from protocol.files import write_durably
from protocol.messages import BaseModelInfo

T = TypeVar("T")
FORMAT = 13
ROOM_GAINED = 1.05
"""By how much the limit must have grown for what was left out to be tried again."""


def cache_folder() -> Path:
    """Return where calibrations are remembered (XDG_CACHE_HOME, else ~/.cache)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tunefleet" / "calibration"


def calibrate(
    model: Path,
    base: BaseModelInfo,
    *,
    dtypes: Sequence[str],
    threads: int,
    seq_len: int,
    scale: float,
    cache: Path,
    blocks: int = 0,
    limit_mib: float = inf,
    backend: Backend = "torch",
    process: ProbingProcess | None = None,
) -> Calibration:
    """Return the constants for each dtype, measured now or remembered.

    With `blocks` they are those of training the last so many; 0 stands for all. Probes keep within
    `limit_mib`: what would take more is not measured. One dtype is measured after the other, for
    two at once would slow each other down.

    Raises:
        WorkerError: a probe's process died; the dtype can't be used.
        ModelError: the model can't be loaded.
    """

    probing = process or ProbingProcess(limit_mib)

    def one(dtype: str) -> ProbeReport:
        mib = base_mib(base, dtype)
        task = ProbeTask(model, dtype, mib, threads, seq_len, scale, blocks, limit_mib, backend)
        name = _name(backend, base.sha256, dtype, threads, seq_len, blocks)
        return _remembered(cache / f"{name}.json", limit_mib, lambda: _measure(task, probing))

    with probing:
        reports = {dtype: one(dtype) for dtype in dtypes}
    ways = {
        Way(dtype, checkpointing): probes
        for dtype, report in reports.items()
        for checkpointing, probes in report.probes.items()
    }
    return Calibration(
        floor_mib=max(r.floor_mib for r in reports.values()),
        weights_mib={dtype: r.weights_mib for dtype, r in reports.items()},
        activations={
            way: fit(probes, base.modules, reports[way.dtype].weights_mib, way, blocks)
            for way, probes in ways.items()
        },
        tokens_s={way: tokens_s(probes) for way, probes in ways.items()},
        backend=backend,
        counted_mib={dtype: base_mib(base, dtype) for dtype in dtypes},
    )


def tokens_s(probes: Sequence[Probe]) -> float:
    """Return the tokens that a way of training trains in a second: the faster of the two longest.

    One is half the other's length: others' load makes them differ more than their length does.
    """
    longest = sorted(probes, key=lambda probe: probe.tokens)[-2:]
    return max(probe.tokens / probe.seconds for probe in longest)


def base_mib(base: BaseModelInfo, dtype: str) -> float:
    """Return what the weights of a base take in `dtype`, MiB."""
    return base.parameters * FROZEN_BYTES[dtype] / MIB


def choose_threads(
    model: Path,
    base: BaseModelInfo,
    *,
    dtype: str,
    most: int,
    scale: float,
    cache: Path,
    limit_mib: float = inf,
    backend: Backend = "torch",
    process: ProbingProcess,
) -> int:
    """Return how many threads train fastest on this device, up to `most`; measured once.

    The process stays as it is, for the probes of that dtype.

    Raises:
        WorkerError: the probe's process died.
        ModelError: the model can't be loaded.
    """
    path = cache / f"{_name(backend, base.sha256, dtype, most, THREAD_TOKENS, 0)}-threads.json"
    mib = base_mib(base, dtype)
    task = ProbeTask(model, dtype, mib, most, THREAD_TOKENS, scale, 0, limit_mib, backend)
    with _one_at_a_time(path):
        kept = _read(path, int)
        if kept is not None:
            return kept
        try:
            threads: int | None = process.ask("choose_threads", task)
        except WorkerKilled:
            threads = None
        if threads is None:  # there was no memory for it: there may be another time
            return most
        _keep(path, threads)
        return threads


class ProbingProcess:
    """Hold the process that probes one dtype, begun when something is to be measured.

    On a small device it takes longer to load libraries and a base than to train a step: so threads
    are chosen in the process that then probes the first dtype.
    """

    def __init__(self, limit_mib: float) -> None:
        self._limit_mib = limit_mib
        self._process: TrainingProcess | None = None
        self._dtype = ""

    def ask(self, name: str, task: ProbeTask) -> Any:
        """Have the task's dtype probed in its process.

        Raises:
            WorkerError: the process died; the next request begins another.
        """
        if task.dtype != self._dtype:
            self.stop()
        if self._process is None:
            self._process, self._dtype = TrainingProcess(self._limit_mib), task.dtype
        try:
            return self._process.call(name, task=task)
        except WorkerError:
            self.stop()
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> ProbingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _measure(task: ProbeTask, process: ProbingProcess) -> ProbeReport:
    try:
        report: ProbeReport = process.ask("calibrate", task)
    except WorkerKilled:  # it took more than was expected of it: nothing is known of this dtype
        return ProbeReport(0.0, task.base_mib, {}, task.limit_mib, complete=False)
    return report


def _remembered(path: Path, limit_mib: float, measure: Callable[[], ProbeReport]) -> ProbeReport:
    """Return what a file remembers, or measure and write it; one process at a time measures.

    What was measured with less memory than now is measured again where something was left out.
    """
    with _one_at_a_time(path):
        found = _read(path, _from_fields)
        if found and (found.complete or limit_mib <= found.limit_mib * ROOM_GAINED):
            return found
        report = measure()
        _keep(path, _to_json(report))
        return report


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time measure what a file remembers."""
    with keeping("measured constants", path.parent, "--cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.with_suffix(".lock").open("w")
    with held as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep(path: Path, what: object) -> None:
    with keeping("measured constants", path.parent, "--cache"):
        write_durably(path, json.dumps(what, indent=1).encode())


def _to_json(report: ProbeReport) -> dict[str, object]:
    return {
        "floor_mib": report.floor_mib,
        "weights_mib": report.weights_mib,
        "limit_mib": report.limit_mib if report.limit_mib < inf else None,
        "complete": report.complete,
        "probes": [
            {"checkpointing": way, **asdict(probe)}
            for way, probes in report.probes.items()
            for probe in probes
        ],
    }


def _read(path: Path, as_what: Callable[[Any], T]) -> T | None:
    """Return what a file remembers; None where there is none, or a damaged one."""
    try:
        return as_what(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _from_fields(fields: Any) -> ProbeReport:
    ways: dict[bool, list[Probe]] = {}
    for probe in fields["probes"]:
        ways.setdefault(probe.pop("checkpointing"), []).append(Probe(**probe))
    return ProbeReport(
        fields["floor_mib"],
        fields["weights_mib"],
        {way: tuple(probes) for way, probes in ways.items()},
        inf if fields["limit_mib"] is None else fields["limit_mib"],
        fields["complete"],
    )


def _name(
    backend: Backend, model_hash: str, dtype: str, threads: int, seq_len: int, blocks: int
) -> str:
    libraries = [f"{name}={version(name)}" for name in LIBRARIES[backend]]
    what = [FORMAT, f"{backend}-cpu", model_hash, dtype, threads, seq_len, *libraries]
    if blocks:
        what.append(f"blocks={blocks}")
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
