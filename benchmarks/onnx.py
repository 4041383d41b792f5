"""Train with ONNX Runtime, torch and a plain PEFT loop: `python -m benchmarks.onnx`.

Each trains the same rows in a process of its own, one after the other: base-tiny, and a random
model of the shape of llama2.c's 15 M one, a row of 128 tokens at a time, LoRA of rank 8 in every
linear module of the blocks, float32. Compared are the largest resident memory of the whole process,
the time from its start to the end of the first step, and tokens trained a second afterwards.
Writes runs/bench/onnx.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.caps import memory_group
from benchmarks.claims import Claim, write_claims
from benchmarks.made_models import make_model
from benchmarks.memory_cases import write_text
from benchmarks.onnx_child import LENGTH
from device_profiles.errors import ReplayError
from device_profiles.processes import Processes
from edge_client.ort.export import export_artifact

PEAK, START, SPEED = 0.40, 0.35, 0.80
"""Shares of plain PEFT's."""
BUDGET_MIB = 512
BACKENDS = ("plain", "torch", "onnx")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process took."""

    peak_mib: float
    start_s: float
    tokens_s: float


def measure(backend: str, model: Path, vocabulary: int, *, threads: int, steps: int) -> Measured:
    """Train in a fresh process and return what it took."""
    what = [backend, str(model), str(vocabulary), str(threads), str(steps), repr(time.time())]
    command = [sys.executable, "-m", "benchmarks.onnx_child", *what]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return Measured(**json.loads(answer.stdout.strip().splitlines()[-1]))


def compare(name: str, model: Path, artifact: Path, args: Any) -> list[Claim]:
    """Measure the backends in turn, print medians, and return the claims about them."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    runs: dict[str, list[Measured]] = {backend: [] for backend in BACKENDS}
    for _ in range(1 if args.quick else args.repeats):
        for backend in BACKENDS:
            folder = artifact if backend == "onnx" else model
            sizes = {"threads": args.threads, "steps": args.steps}
            runs[backend].append(measure(backend, folder, vocabulary, **sizes))
    middle = {
        backend: Measured(
            statistics.median(m.peak_mib for m in found),
            statistics.median(m.start_s for m in found),
            statistics.median(m.tokens_s for m in found),
        )
        for backend, found in runs.items()
    }
    print(f"{name:12} peak MiB  start s  tokens/s")
    for backend, m in middle.items():
        print(f"  {backend:10} {m.peak_mib:8.0f} {m.start_s:8.2f} {m.tokens_s:9.0f}", flush=True)
    plain, onnx = middle["plain"], middle["onnx"]
    peak, start = onnx.peak_mib / plain.peak_mib, onnx.start_s / plain.start_s
    speed = onnx.tokens_s / plain.tokens_s
    return [
        Claim(f"{name}: peak, of plain PEFT's", peak, f"≤ {PEAK}", peak <= PEAK),
        Claim(f"{name}: start to first step, of it", start, f"≤ {START}", start <= START),
        Claim(f"{name}: tokens a second, of it", speed, f"≥ {SPEED}", speed >= SPEED),
    ]


def capped(model: Path, artifact: Path, backend: str, folder: Path) -> str:
    """Take part in a job of two rounds in 512 MiB; return the plan and peak, or why there is none.

    The whole client is in a memory cgroup with that limit, where one may be made; elsewhere it is
    told --memory-cap, which is of its training process alone.
    """
    job = {
        "job": "small",
        "model": str(model),
        "rounds": 2,
        "ladder": [2, 4, 8],
        "training": {"steps": 2, "tokens_per_step": 2 * LENGTH, "max_tokens": LENGTH},
        "policy": {"min_devices": 1, "quorum": 1},
    }
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    text = write_text(folder, 4, LENGTH)
    run: list[object] = ["run", "--json", "--exit-when-done", "--name", "small", "--data", text]
    run += ["--model", model, "--threads", 1, "--cache", folder / "cache"]
    run += ["--state", folder / "small", "--backend", backend, "--onnx", artifact]
    serve = ["serve", folder / "job.json", "--state", folder / "server", "--json"]
    plan = ""
    with memory_group(BUDGET_MIB) as group, Processes(folder / "log", folder) as processes:
        processes.start("aggregator", "aggregator", serve)
        for event in processes.events(1800):
            if event["event"] == "serving":
                more = [] if group else ["--memory-cap", BUDGET_MIB]
                processes.start("small", "edge_client", [*run, "--broker", event["broker"], *more])
                if group is not None:
                    (group / "cgroup.procs").write_text(str(processes.pid("small")))
            elif event["event"] == "plan":
                plan = event["plan"]
            elif event["event"] == "finished" and "peak_mib" in event:
                peak_mib = event["floor_mib"] + event["peak_mib"]
                return f"finished, {peak_mib:.0f} MiB of training: {plan}"
    raise AssertionError("events end with the job's, or an error")


def main() -> None:
    """Measure, print tables, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each backend")
    parser.add_argument("--quick", action="store_true", help="one process of each backend")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    claims = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for shape in ("base-tiny", "15M"):
            model, artifact = make_model(shape, folder), folder / f"{shape}-set"
            export_artifact(str(model), artifact)
            claims += compare(shape, model, artifact, args)
            for backend in BACKENDS[1:]:
                try:
                    outcome = capped(model, artifact, backend, folder / f"{shape}-{backend}")
                except ReplayError as error:
                    outcome = str(error)
                print(f"  {backend} in {BUDGET_MIB} MiB: {outcome}", flush=True)
                fits = outcome.startswith("finished")
                wanted = "finished" if backend == "onnx" else "does not fit"
                met = fits == (backend == "onnx")
                claims.append(Claim(f"{shape}: {backend} in 512 MiB", outcome, wanted, met))
    write_claims("onnx", claims, **vars(args))


if __name__ == "__main__":
    main()
