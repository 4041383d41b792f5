"""Compare predicted with measured peaks of training: `python -m benchmarks.memory_plan`.

Base-tiny, a 15M- and a SmolLM2-135M-shaped model with random weights; each case trains in a fresh
process that goes through what an agent's does. The constants come from the probes that a device
runs. What was measured is kept in runs/bench/memory_plan, for the code of training as it is: a run
that was stopped goes on where it was, and prints the finished cases from there (--fresh: measure
all anew). Writes runs/bench/memory_plan.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import edge_client
from benchmarks.claims import FOLDER, Claim, write_claims
from benchmarks.made_models import make_model
from benchmarks.memory_cases import (
    CASES,
    LEAN,
    QUICK,
    SCALE,
    SMALLEST,
    Case,
    measure,
    predicted,
    write_text,
)
from edge_client.calibrate import calibrate
from edge_client.model import describe_model
from edge_client.plan import Calibration
from edge_client.profile import slug
from protocol.messages import BaseModelInfo

NINE_TENTHS, ALL, UNDER = 0.10, 0.15, 0.05
MEASURED_CODE = ("model.py", "data/pack.py", "trainer/*.py")
"""What a measured peak rests on; the arithmetic of memory.py may change under it."""
OTHER_CODE = ("process.py", "pipe.py", "watchdog.py")


class Bench:
    """Hold models, texts and what is remembered."""

    def __init__(self, folder: Path, remembered: Path, threads: int) -> None:
        self._folder, self._remembered, self._threads = folder, remembered, threads
        self._bases: dict[str, BaseModelInfo] = {}

    def row(self, case: Case) -> dict[str, object]:
        """Return what was predicted and measured for a case, MiB, and the ratios."""
        model = make_model(case.model, self._folder)
        if case.model not in self._bases:
            self._bases[case.model] = describe_model(str(model))
        base = self._bases[case.model]
        calibration = self._calibration(case, model, base)
        plan = predicted(case, base, calibration, self._threads)
        kept = self._remembered / f"{slug(str(case))}-{self._threads}.json"
        if not kept.exists():
            text = write_text(self._folder, 2 * case.micro_batch, case.length)
            kept.write_text(json.dumps(measure(case, plan, base, model, text)))
        floor_mib, above_mib = json.loads(kept.read_text())
        whole_mib = calibration.floor_mib + plan.predicted_mib
        return {
            "case": str(case),
            "predicted_mib": whole_mib,
            "measured_mib": floor_mib + above_mib,
            "ratio": (floor_mib + above_mib) / whole_mib,
            "predicted_above_floor_mib": plan.predicted_mib,
            "measured_above_floor_mib": above_mib,
            "ratio_above_floor": above_mib / plan.predicted_mib,
        }

    def _calibration(self, case: Case, model: Path, base: BaseModelInfo) -> Calibration:
        return calibrate(
            model,
            base,
            dtypes=(case.dtype,),
            threads=self._threads,
            seq_len=case.length,
            scale=SCALE,
            cache=self._remembered / "calibration",
            blocks=case.blocks,
        )


def code_hash() -> str:
    """Return a hash of the code that what is remembered was measured with."""
    root = Path(edge_client.__file__).parent
    files = sorted(path for pattern in MEASURED_CODE for path in root.glob(pattern))
    files = [path for path in files if path.name not in OTHER_CODE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def claims(ratios: list[float]) -> list[Claim]:
    """Return what was claimed of measured / predicted peaks of the whole process."""
    off = sorted(abs(ratio - 1) for ratio in ratios)
    nine = sum(o <= NINE_TENTHS for o in off) / len(off)
    return [
        Claim("cases", len(ratios), "≥ 24", len(ratios) >= 24),
        Claim(f"share of cases within ±{NINE_TENTHS:.0%}", nine, "≥ 0.9", nine >= 0.9),
        Claim("farthest from the prediction", off[-1], f"≤ {ALL}", off[-1] <= ALL),
        Claim(
            "measured / predicted, largest", max(ratios), f"≤ {1 + UNDER}", max(ratios) <= 1 + UNDER
        ),
    ]


def lean_claims(rows: list[dict[str, object]]) -> list[Claim]:
    """Return what was claimed of training all that is held without Adam's moments."""
    above = {str(row["case"]): float(str(row["measured_above_floor_mib"])) for row in rows}
    if not {str(SMALLEST), str(LEAN)} <= above.keys():
        return []
    ratio = above[str(LEAN)] / above[str(SMALLEST)]
    return [Claim(f"peak above the floor, {LEAN} / {SMALLEST}", ratio, "≤ 1", ratio <= 1)]


def main() -> None:
    """Measure, print a line for each case, write the claims."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"the first {len(QUICK)} cases only")
    parser.add_argument("--model", help="the cases of one model only: base-tiny, 15M or 135M")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--threads", type=int, default=1, help="threads of training (default 1)")
    options = parser.parse_args()
    remembered = FOLDER / "memory_plan" / code_hash()
    if options.fresh:
        shutil.rmtree(remembered, ignore_errors=True)
    remembered.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), remembered, options.threads)
        print(f"{'':44} above the floor, MiB            whole process")
        print(f"{'case':44} predicted  measured  ratio     MiB  ratio")
        for case in QUICK if options.quick else CASES:
            if options.model not in (None, case.model):
                continue
            row = bench.row(case)
            rows.append(row)
            print(
                f"{row['case']:44} {row['predicted_above_floor_mib']:9.1f} "
                f"{row['measured_above_floor_mib']:9.1f} {row['ratio_above_floor']:6.3f} "
                f"{row['measured_mib']:7.0f} {row['ratio']:6.3f}",
                flush=True,
            )
    found = claims([float(str(row["ratio"])) for row in rows]) + lean_claims(rows)
    write_claims("memory_plan", found, cases=rows)


if __name__ == "__main__":
    main()
