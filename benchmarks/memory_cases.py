"""The cases of `benchmarks.memory_plan`, and what each takes in a fresh process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from device_profiles.demo_text import write_demo_text
from edge_client.data.split import SHARES
from edge_client.memory import Optimizer, Way, predict_mib
from edge_client.plan import Calibration, Plan
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text
from protocol.adapter import initial_adapter, module_directions, select, without
from protocol.layers import last_blocks, only
from protocol.messages import BaseModelInfo, Pruning, Training

SCALE, STEPS = 2.0, 2
CHARACTERS_OF_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a way to train it; `steps_of` is the micro-batches of one step."""

    model: str
    dtype: str
    checkpointing: bool
    rank: int
    held: int
    micro_batch: int
    length: int
    steps_of: int = 1
    blocks: int = 0
    """The last so many are trained; 0: all."""
    optimizer: Optimizer = "adamw"

    @property
    def way(self) -> Way:
        return Way(self.dtype, self.checkpointing)

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length

    def __str__(self) -> str:
        """Return one line that no other case has."""
        way = f"{self.dtype}{' ckpt' if self.checkpointing else ''}"
        way += " lean" if self.optimizer == "adafactor" else ""
        blocks = f" last {self.blocks}" if self.blocks else ""
        return (
            f"{self.model} {way} r{self.rank}/{self.held} {self.micro_batch}×{self.length}"
            f"×{self.steps_of}{blocks}"
        )


SMALLEST = Case("135M", "f32", True, 2, 64, 1, 256, steps_of=2)
LEAN = replace(SMALLEST, rank=64, optimizer="adafactor")
"""The smallest rank with Adam's moments, and all that is held without: see `fit` in docs/job.md."""
QUICK = (
    SMALLEST,
    LEAN,
    Case("base-tiny", "f32", True, 4, 64, 1, 256),
    Case("base-tiny", "bf16", False, 16, 64, 2, 256, steps_of=2),
    Case("base-tiny", "f32", False, 4, 64, 1, 256, blocks=3),
    Case("15M", "f32", False, 8, 8, 2, 256, steps_of=2),
    Case("15M", "bf16", False, 4, 64, 4, 256),
    Case("15M", "f32", True, 64, 64, 4, 256),
    Case("135M", "bf16", True, 4, 64, 1, 256),
    Case("135M", "bf16", False, 32, 64, 4, 256),
)
"""Every model, both dtypes; one length, for each length is measured anew."""
CASES = (
    *QUICK,
    Case("135M", "f32", True, 4, 64, 1, 256),
    Case("135M", "f32", False, 16, 64, 2, 256),
    Case("15M", "bf16", False, 64, 64, 1, 256),
    Case("base-tiny", "f32", False, 64, 64, 2, 256),
    Case("base-tiny", "f32", True, 4, 64, 1, 256, blocks=1),
    Case("base-tiny", "bf16", True, 4, 4, 4, 128),
    Case("15M", "f32", False, 16, 64, 1, 128),
    Case("135M", "bf16", False, 8, 64, 1, 128),
    Case("135M", "bf16", True, 4, 64, 2, 128),
    Case("base-tiny", "f32", False, 16, 64, 4, 512),
    Case("base-tiny", "bf16", False, 64, 64, 4, 512),
    Case("15M", "f32", True, 64, 64, 4, 512),
    Case("15M", "bf16", True, 32, 64, 2, 512),
    Case("15M", "bf16", True, 4, 64, 32, 256),
    Case("15M", "f32", False, 32, 32, 4, 512),
    Case("135M", "bf16", True, 64, 64, 4, 512),
    Case("135M", "bf16", False, 16, 16, 1, 512, steps_of=2),
    Case("135M", "f32", False, 64, 64, 4, 128),
    Case("135M", "f32", False, 4, 4, 1, 512),
    Case("135M", "f32", True, 16, 64, 4, 512),
    Case("15M", "f32", False, 4, 64, 1, 256, blocks=2),
    Case("135M", "bf16", False, 64, 64, 4, 512),
    Case("135M", "f32", False, 16, 64, 4, 512),
    Case("135M", "bf16", True, 64, 64, 1, 256, steps_of=2, optimizer="adafactor"),
    Case("15M", "f32", False, 16, 64, 2, 256, optimizer="adafactor"),
    Case("base-tiny", "f32", True, 64, 64, 1, 256, steps_of=4, optimizer="adafactor"),
)


def predicted(case: Case, base: BaseModelInfo, calibration: Calibration, threads: int) -> Plan:
    """Return the case as a plan, with its prediction."""
    mib = predict_mib(
        base.modules,
        weights_mib=calibration.weights_mib[case.dtype],
        activations=calibration.activations[case.way],
        way=case.way,
        rank=case.rank,
        held=case.held,
        tokens=case.tokens,
        accumulates=case.steps_of > 1,
        blocks=case.blocks,
        optimizer=case.optimizer,
    )
    return Plan(
        rank=case.rank,
        held=case.held,
        micro_batch=case.micro_batch,
        seq_len=case.length,
        checkpointing=case.checkpointing,
        dtype=case.dtype,
        threads=threads,
        predicted_mib=mib,
        budget_mib=mib,
        blocks=case.blocks,
        optimizer=case.optimizer,
    )


def write_text(folder: Path, rows: int, length: int) -> Path:
    """Write a text of which `rows` sequences of `length` tokens, or a few more, are held out."""
    demo = folder / "demo"
    if not demo.exists():
        write_demo_text(demo, seed=0)
    whole = "\n\n".join(p.read_text("utf-8") for p in sorted(demo.rglob("*")) if p.is_file())
    target = folder / f"{rows}x{length}.txt"
    target.write_text(whole[: int(rows * length * CHARACTERS_OF_A_TOKEN / SHARES[2])])
    return target


def measure(
    case: Case, plan: Plan, base: BaseModelInfo, model: Path, text: Path
) -> tuple[float, float]:
    """Return floor and peak above it, MiB, of some rounds of this plan in a fresh process."""
    training = Training(
        steps=STEPS, tokens_per_step=case.tokens * case.steps_of, max_tokens=case.length
    )
    whole = initial_adapter(base.modules, plan.held, SCALE, seed=0)
    with TrainingProcess() as process:
        process.call("open", model=model, text=Text((text,), 0), plan=plan)
        process.call("evaluate", split="held_out")
        for number in range(1 if case.model == "135M" else 2):
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
                "train", stream="fleet", settings=training, learning_rate=1e-3, pruning=Pruning()
            )
        floor_mib, peak_mib = process.call("memory")
    return floor_mib, peak_mib
