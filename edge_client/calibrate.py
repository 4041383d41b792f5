"""Measure the memory model's constants once on this device, and remember them.

The cache is keyed by what the constants depend on: the model's hash, the dtype, the length, the
number of threads and the versions of the libraries. Several agents on one machine measure once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from edge_client.memory import Probe, Way, fit
from edge_client.plan import Calibration
from edge_client.storage import keeping
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import ProbeReport
from protocol.files import write_durably
from protocol.messages import BaseModelInfo

FORMAT = 11


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
) -> Calibration:
    """Return the constants for each dtype, measured now or remembered.

    With `blocks` they are those of training the last so many; 0 stands for all.

    Raises:
        WorkerError: a probe's process died, for its memory perhaps; the dtype can't be used.
        ModelError: the model can't be loaded.
    """

    def one(dtype: str) -> ProbeReport:
        name = _name(base.sha256, dtype, threads, seq_len, blocks)
        return _remembered(
            cache / f"{name}.json",
            lambda: _measure(model, dtype, threads, seq_len, scale, blocks),
        )

    with ThreadPoolExecutor(len(dtypes)) as pool:
        reports = dict(zip(dtypes, pool.map(one, dtypes), strict=True))
    return Calibration(
        floor_mib=max(r.floor_mib for r in reports.values()),
        weights_mib={dtype: r.weights_mib for dtype, r in reports.items()},
        activations={
            way: fit(
                report.probes[way.checkpointing], base.modules, report.weights_mib, way, blocks
            )
            for dtype, report in reports.items()
            for way in (Way(dtype, checkpointing) for checkpointing in report.probes)
        },
    )


def _measure(
    model: Path, dtype: str, threads: int, seq_len: int, scale: float, blocks: int
) -> ProbeReport:
    with TrainingProcess() as process:
        report: ProbeReport = process.call(
            "calibrate",
            model=model,
            dtype=dtype,
            threads=threads,
            seq_len=seq_len,
            scale=scale,
            blocks=blocks,
        )
    return report


def _remembered(path: Path, measure: Callable[[], ProbeReport]) -> ProbeReport:
    """Return what a file remembers, or measure and write it; one process at a time measures."""
    with keeping("measured constants", path.parent, "--cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.with_suffix(".lock").open("w")
    with held as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return _from_json(path.read_text())
        report = measure()
        with keeping("measured constants", path.parent, "--cache"):
            write_durably(path, json.dumps(_to_json(report), indent=1).encode())
        return report


def _to_json(report: ProbeReport) -> dict[str, object]:
    return {
        "floor_mib": report.floor_mib,
        "weights_mib": report.weights_mib,
        "probes": [
            {"checkpointing": way, **asdict(probe)}
            for way, pair in report.probes.items()
            for probe in pair
        ],
    }


def _from_json(text: str) -> ProbeReport:
    fields = json.loads(text)
    pairs: dict[bool, list[Probe]] = {}
    for probe in fields["probes"]:
        pairs.setdefault(probe.pop("checkpointing"), []).append(Probe(**probe))
    return ProbeReport(
        fields["floor_mib"],
        fields["weights_mib"],
        {way: (pair[0], pair[1]) for way, pair in pairs.items()},
    )


def _name(model_hash: str, dtype: str, threads: int, seq_len: int, blocks: int) -> str:
    libraries = [f"{name}={version(name)}" for name in ("torch", "transformers")]
    what = [FORMAT, model_hash, dtype, threads, seq_len, *libraries]
    if blocks:
        what.append(f"blocks={blocks}")
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
