"""How fast, exact and small a product merge is, beside a dense one: `python -m benchmarks.merge`.

    python -m benchmarks.merge [--quick] [--one-thread]

The other side is what public FlexLoRA code does: a dense float32 sum and `torch.linalg.svd` of it,
a module. Both results are compared with a float64 SVD. Memory is measured in a process of its own,
which reads one module at a time from files (Linux: from /proc); what is there before a merge, the
round with its previous global among it, is not counted, what earlier modules left is.
`--one-thread` is for a machine that others use: it counts processor seconds, with one thread for
either side. Writes runs/bench/merge.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch

from aggregator.merge import merge
from benchmarks.claims import Claim, write_claims
from benchmarks.merge_rounds import (
    Case,
    Errors,
    Oracle,
    dense_float32,
    one_module,
    round_in_files,
    round_in_memory,
    write_round,
)
from protocol.adapter import Shapes

RULE = "flexlora"
SQUARE, WIDE = (2048, 2048), (2048, 8192)
QUICK = (one_module(10, SQUARE), one_module(10, WIDE), one_module(100, SQUARE))
CASES = (
    *QUICK,
    one_module(10, SQUARE, "flat"),
    one_module(100, SQUARE, "flat"),
    one_module(100, WIDE),
    one_module(1000, SQUARE),
    one_module(1000, WIDE),
)
AT_LEAST = {(10, SQUARE): 50.0, (10, WIDE): 200.0}
OTHERWISE = 5.0
CLOSE = 1e-5
SPARE = 1.1


def smollm2_135m() -> Shapes:
    """Return the target modules of SmolLM2-135M."""
    targets = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    targets |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    return {f"{layer}.{name}": shape for layer in range(30) for name, shape in targets.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """What one case showed: seconds of both ways and of one read of the input, and errors."""

    case: str
    merge_s: float
    dense_s: float
    read_s: float
    ours: Errors
    dense: Errors

    @property
    def speed_up(self) -> float:
        return self.dense_s / self.merge_s


THREADS = "OPENBLAS_NUM_THREADS"


def on_one_thread() -> None:
    """Begin anew with one thread: numpy's number is settled when it is imported."""
    if os.environ.get(THREADS) != "1":
        environment = os.environ | {THREADS: "1"}
        command = [sys.executable, "-m", "benchmarks.merge", *sys.argv[1:]]
        os.execvpe(sys.executable, command, environment)
    torch.set_num_threads(1)


def seconds(do: Callable[[], object], times: int) -> float:
    """Return the median time of some calls, after one that is not counted."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    do()
    taken = []
    for _ in range(times):
        started = clock()
        do()
        taken.append(clock() - started)
    return median(taken)


def compare(case: Case) -> Found:
    """Merge a case both ways, and compare both with the oracle."""
    view = round_in_memory(case)
    oracle = Oracle(view)
    ours, dense = merge(RULE, view).adapter.layers["m"], dense_float32(view)["m"]
    return Found(
        str(case),
        seconds(lambda: merge(RULE, view), 3),
        seconds(lambda: dense_float32(view), 1),
        read_seconds(case),
        oracle.errors(ours),
        oracle.errors(dense),
    )


def read_seconds(case: Case) -> float:
    """Return how long one read of the input from disk takes, out of the page cache's reach."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_round(case, Path(folder))
        for file in files:
            handle = os.open(file, os.O_RDWR)
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        started = time.perf_counter()
        for file in files:
            file.read_bytes()
        return time.perf_counter() - started


# ---- memory -----------------------------------------------------------------------------------


def peak_share(case: Case) -> float:
    """Return a merge's peak memory, by (largest module's stacks + whole output) in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_round(case, Path(folder))
        command = [sys.executable, "-m", "benchmarks.merge", "--peak-of", folder]
        fields = {"devices": case.devices, "shapes": case.shapes, "ranks": case.ranks}
        answer = subprocess.run(
            [*command, json.dumps(fields)], capture_output=True, text=True, check=True
        )
    return float(answer.stdout) / (case.stack_bytes + case.output_bytes)


def peak_claims(fleets: tuple[int, ...]) -> list[Claim]:
    """Return a claim of memory for each number of devices, with one module and with two alike."""
    claims = []
    for devices in fleets:
        for modules in (1, 2):
            case = Case(devices, {f"m{i}": SQUARE for i in range(modules)})
            said = f"peak memory by float32 stacks of a module + output, {case}"
            peak = peak_share(case)
            claims.append(Claim(said, peak, f"≤ {SPARE}", peak <= SPARE))
    return claims


def print_peak(folder: Path, fields: str) -> None:
    """Print by how many bytes merging a round in files raises this process's peak."""
    told = json.loads(fields)
    shapes = {name: (int(out), int(into)) for name, (out, into) in told["shapes"].items()}
    case = Case(told["devices"], shapes, tuple(told["ranks"]))
    for warm in (one_module(2, (256, 256)), one_module(50, (640, 640))):  # by Grams, by passes
        merge(RULE, round_in_memory(warm))
    for dtype in (np.float32, np.float64):  # what BLAS takes once, a thread, is not counted
        np.ones(SQUARE, dtype) @ np.ones(SQUARE, dtype)
    view = round_in_files(case, folder)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what these have left is no room that costs nothing
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    merge(RULE, view)
    status = Path("/proc/self/status").read_text()
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak_kib) * 1024 - before)


# ---- growth -----------------------------------------------------------------------------------


def growth(quick: bool) -> dict[str, float]:
    """Return seconds of merges that differ in devices, in ranks, or in modules."""
    shape = (512, 512) if quick else (1024, 1024)
    cases = {f"{k} devices": one_module(k, shape) for k in (5, 10, 20, 40, 80)}
    for rank in (4, 8, 16, 32):
        cases[f"10 devices of rank {rank}"] = Case(10, {"m": shape}, (rank,))
    for modules in (1, 2, 4, 8):
        cases[f"10 devices, {modules} modules"] = Case(10, {f"m{i}": shape for i in range(modules)})
    found = {}
    for name, case in cases.items():
        view = round_in_memory(case)
        found[name] = seconds(lambda view=view: merge(RULE, view), 3)  # type: ignore[misc]
    return found


# ---- all of it --------------------------------------------------------------------------------


def speed_claims(cases: tuple[Case, ...], found: list[Found]) -> list[Claim]:
    """Return one claim of speed a case."""
    claims = []
    for case, one in zip(cases, found, strict=True):
        least = AT_LEAST.get((case.devices, case.shapes["m"]), OTHERWISE)
        said = f"times as fast as dense float32, {case}"
        claims.append(Claim(said, one.speed_up, f"≥ {least:g}", one.speed_up >= least))
    return claims


def main() -> None:
    """Measure, print tables, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, no whole model")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one-thread", action="store_true", help="processor seconds")
    given = parser.parse_args()
    if given.one_thread:
        on_one_thread()
    if given.peak_of:
        print_peak(Path(given.peak_of[0]), given.peak_of[1])
        return
    cases = QUICK if given.quick else CASES
    found = []
    for case in cases:
        found.append(one := compare(case))
        print(
            f"{one.case:42} {one.merge_s:8.3f} s, dense {one.dense_s:8.3f} s, "
            f"{one.merge_s / one.read_s:6.2f} x one read; distance {one.ours.distance:.1e} "
            f"(dense {one.dense.distance:.1e}), excess {one.ours.excess:.1e} "
            f"(dense {one.dense.excess:.1e})",
            flush=True,
        )
    apart = [f for case, f in zip(cases, found, strict=True) if case.spectrum == "separated"]
    furthest = max(f.ours.distance for f in apart)
    excess = max(f.ours.excess for f in found)
    claims = [
        *speed_claims(cases, found),
        Claim("distance from the float64 oracle, largest", furthest, "≤ 1e-5", furthest <= CLOSE),
        Claim("truncation error over the optimum's, largest", excess, "≤ 1e-5", excess <= CLOSE),
        *peak_claims((10, 100) if given.quick else (10, 100, 1000)),
    ]
    if not given.quick:
        whole = round_in_memory(Case(100, smollm2_135m()))
        took = seconds(lambda: merge(RULE, whole), 1)
        claims.append(Claim("seconds for SmolLM2-135M of 100 devices", took, "reported", True))
    grown = growth(given.quick)
    for name, took in grown.items():
        print(f"{name:42} {took:8.4f} s")
    write_claims("merge", claims, cases=[asdict(f) for f in found], seconds=grown)


if __name__ == "__main__":
    main()
