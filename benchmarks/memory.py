"""Compare predicted with measured peaks of training: `python -m benchmarks.memory [--quick]`.

Each plan trains base-tiny in a fresh process and goes through what an agent's does: open, evaluate
the base, then rounds of evaluate and train, evaluate. Writes runs/bench/memory.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import base_tiny
from benchmarks.claims import Claim, write_claims
from device_profiles.demo_text import write_demo_text
from edge_client.calibrate import calibrate
from edge_client.memory import Way, predict_mib
from edge_client.model import describe_model
from edge_client.plan import Calibration, Plan, headroom_mib
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text
from protocol.adapter import initial_adapter, module_directions, select, without
from protocol.layers import last_blocks, only
from protocol.messages import BaseModelInfo, Pruning, Training

LENGTH, SCALE, ROUNDS, STEPS = 256, 2.0, 3, 2
BAND = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """A way to train; `steps_of` is the micro-batches of one step."""

    dtype: str
    checkpointing: bool
    rank: int
    held: int
    micro_batch: int = 1
    steps_of: int = 1
    blocks: int = 0
    """The last so many are trained; 0: all."""


QUICK = (
    Case("f32", True, 2, 2),
    Case("f32", True, 2, 64),
    Case("f32", False, 64, 64),
    Case("bf16", True, 2, 64),
    Case("bf16", False, 16, 64, 2, 2),
    Case("f32", False, 2, 64),
    Case("f32", False, 2, 64, blocks=3),
    Case("f32", False, 2, 64, blocks=1),
)
CASES = (
    *QUICK,
    Case("f32", True, 2, 64, blocks=3),
    Case("f32", True, 2, 64, blocks=1),
    Case("f32", True, 64, 64, 2, 2),
    Case("f32", False, 2, 2),
    Case("f32", False, 16, 64, 4),
    Case("f32", True, 16, 32, 4, 2),
    Case("bf16", True, 2, 2),
    Case("bf16", False, 64, 64),
    Case("bf16", True, 32, 64, 4),
    Case("bf16", False, 2, 16, 1, 4),
)


def predicted(case: Case, base: BaseModelInfo, calibration: Calibration) -> Plan:
    """Return the case as a plan with its prediction."""
    way = Way(case.dtype, case.checkpointing)
    mib = predict_mib(
        base.modules,
        weights_mib=calibration.weights_mib[case.dtype],
        activations=calibration.activations[way],
        way=way,
        rank=case.rank,
        held=case.held,
        tokens=case.micro_batch * LENGTH,
        accumulates=case.steps_of > 1,
        blocks=case.blocks,
    )
    return Plan(
        case.rank,
        case.held,
        case.micro_batch,
        LENGTH,
        case.checkpointing,
        case.dtype,
        1,
        mib,
        mib,
        case.blocks,
    )


def measure(case: Case, plan: Plan, base: BaseModelInfo, text: Path) -> float:
    """Return the peak above the floor, MiB, of some rounds of this plan in a fresh process."""
    training = Training(
        steps=STEPS, tokens_per_step=case.micro_batch * LENGTH * case.steps_of, max_tokens=LENGTH
    )
    whole = initial_adapter(base.modules, plan.held, SCALE, seed=0)
    with TrainingProcess() as process:
        process.call("open", model=base_tiny.PATH, text=Text((text,), 0), plan=plan)
        process.call("evaluate", split="held_out")
        for number in range(ROUNDS):
            process.call("load", trained=None, frozen=whole)
            process.call("evaluate", split="held_out")
            chosen = module_directions(
                base.modules,
                "rotating",
                job="bench",
                device="bench",
                round_number=number,
                rank_trained=plan.rank,
                held=plan.held,
            )
            chosen = only(chosen, last_blocks(base.modules, plan.blocks))
            process.call("load", trained=select(whole, chosen), frozen=without(whole, chosen))
            process.call(
                "train",
                stream="fleet",
                settings=training,
                learning_rate=1e-3,
                pruning=Pruning(),
            )
        process.call("load", trained=None, frozen=whole)
        process.call("evaluate", split="held_out")
        peak_mib: float = process.call("memory")[1]
    return peak_mib


def main() -> None:
    """Measure, print a table, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="eight plans instead of eighteen")
    cases = QUICK if parser.parse_args().quick else CASES
    base = describe_model("base-tiny")
    ratios, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_demo_text(Path(folder) / "text", seed=0)
        calibrations = {
            blocks: calibrate(
                base_tiny.PATH,
                base,
                dtypes=("f32",) if blocks else ("f32", "bf16"),
                threads=1,
                seq_len=LENGTH,
                scale=SCALE,
                cache=Path(folder) / "cache",
                blocks=blocks,
            )
            for blocks in sorted({case.blocks for case in cases})
        }
        print(f"{'plan':58} predicted  measured  ratio")
        for case in cases:
            calibration = calibrations[case.blocks]
            plan = predicted(case, base, calibration)
            peak_mib = measure(case, plan, base, Path(folder) / "text" / "markup")
            ratios.append(peak_mib / plan.predicted_mib)
            fixed_mib = calibration.activations[Way(case.dtype, case.checkpointing)].fixed_mib
            headroom = headroom_mib(plan.predicted_mib, fixed_mib)
            shares.append((peak_mib - plan.predicted_mib) / headroom)
            print(
                f"{plan!s:50} ×{case.steps_of:<6} {plan.predicted_mib:9.1f} {peak_mib:9.1f} "
                f"{ratios[-1]:6.2f}",
                flush=True,
            )
    above, below, used = max(ratios), min(ratios), max(shares)
    write_claims(
        "memory",
        [
            Claim("measured peak / predicted, largest", above, f"≤ {1 + BAND}", above <= 1 + BAND),
            Claim("measured peak / predicted, smallest", below, f"≥ {1 - BAND}", below >= 1 - BAND),
            Claim("share of the headroom that a peak took, largest", used, "≤ 1", used <= 1),
        ],
    )


if __name__ == "__main__":
    main()
