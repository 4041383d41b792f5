"""Training on a device against the plain loop: `python -m benchmarks.train [--quick]`.

A model of SmolLM2-135M's shape with random weights, rank 16 on all linear modules, steps of 4×256
tokens. The plain loop (`train_plain.py`) and the training process of an agent take the same tokens
in the same steps from the same adapter, each in a fresh process, one after the other, a few times
over. What is compared are medians over all these, of the steps after the first.

The floor is the time of the matrix products alone, forward and backward, of the frozen weights and
the adapter's, at the rate at which torch multiplies these very shapes here.
Writes runs/bench/train.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil

import base_tiny
from benchmarks.claims import Claim, write_claims
from benchmarks.train_floor import floor_seconds, frozen_products
from benchmarks.train_plain import Step, plain_loop
from device_profiles.demo_text import write_demo_text
from edge_client.data import (
    Batch,
    BatchStream,
    TokenSequence,
    pack,
    read_examples,
    split_examples,
    tokenize,
)
from edge_client.model import describe_model, load_tokenizer
from edge_client.plan import Plan
from edge_client.profile import measure_profile, native_bf16
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text
from protocol.adapter import initial_adapter
from protocol.messages import Training

ROWS, LENGTH, RANK, SCALE = 4, 256, 16, 2.0
PLAIN = "plain loop"
AMPLE_MIB = 8192.0


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train, by the device's own process or (`plan` None) by the plain loop."""

    name: str
    plan: Plan | None
    text: str


@dataclass(slots=True)
class Found:
    """What the runs of one way took."""

    seconds: list[float] = field(default_factory=list)
    """Of each step but the first, wall time."""
    processor: list[float] = field(default_factory=list)
    """The same, time on a processor."""
    tokens: list[int] = field(default_factory=list)
    peaks_mib: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the last run's steps."""

    @property
    def speed(self) -> float:
        """Return counted tokens a second."""
        return median(t / s for t, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def processor_speed(self) -> float:
        """Return counted tokens a second of processor time: nearly the same on an idle machine."""
        return median(t / s for t, s in zip(self.tokens, self.processor, strict=True))

    @property
    def peak_mib(self) -> float:
        return median(self.peaks_mib)


def make_model(folder: Path) -> None:
    """Write a model of SmolLM2-135M's shape, in bfloat16 as models are published."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    for file in base_tiny.PATH.glob("*token*"):
        shutil.copy(file, folder)


def write_texts(folder: Path) -> dict[str, Path]:
    """Write the same prose and code as one long text, and a paragraph a row."""
    write_demo_text(folder / "demo", seed=0)
    whole = "\n\n".join(
        file.read_text() for file in sorted((folder / "demo").rglob("*")) if file.is_file()
    )
    long, rows = folder / "long.txt", folder / "paragraphs.jsonl"
    long.write_text(whole)
    paragraphs = (part.strip() for part in whole.split("\n\n"))
    rows.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs if len(p) > 20))
    return {"even": long, "uneven": rows}


def batches_of(model: Path, text: Path, steps: int) -> list[Batch]:
    """Return the batches that a device's stream begins with."""
    reading = read_examples([text])
    train = split_examples(reading.examples, seed=0, problems=reading.problems).train
    sequences = tokenize(train, load_tokenizer(model), max_tokens=LENGTH)
    return list(islice(BatchStream(pack(sequences, LENGTH, seed=0), ROWS, seed=0), steps))


def unpacked(batch: Batch) -> Step:
    """Return what a batch holds as micro-batches of at most four sequences."""
    found = [
        TokenSequence(ids[there].astype("int32"), labels[there].astype("int32"))
        for ids, labels, segments in zip(batch.ids, batch.labels, batch.segments, strict=True)
        for number in range(1, segments.max() + 1)
        if (there := segments == number).any()
    ]
    return [found[at : at + ROWS] for at in range(0, len(found), ROWS)]


class Clock:
    """Note wall and processor time of a process at each step."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        times = self._process.cpu_times()
        return time.monotonic(), times.user + times.system

    def step(self, found: Found, tokens: int, *, first: bool) -> None:
        """Add the time since the last call; the first step's is not counted."""
        now = self._now()
        if not first:
            found.seconds.append(now[0] - self._last[0])
            found.processor.append(now[1] - self._last[1])
            found.tokens.append(tokens)
        self._last = now


def run_plain(
    found: Found, model: Path, batches: list[Batch], setting: Training, threads: int
) -> None:
    """Run the plain loop once."""
    adapter = initial_adapter(describe_model(str(model)).modules, RANK, SCALE, seed=0)
    steps = [unpacked(batch) for batch in batches]
    with child(plain_loop, model, steps, adapter, setting, threads) as (pid, connection):
        clock, found.losses = Clock(pid), []
        for number, batch in enumerate(batches):
            found.losses.append(connection.recv())
            clock.step(found, batch.tokens, first=number == 0)
        found.peaks_mib.append(connection.recv())


def run_ours(
    found: Found, model: Path, text: Path, batches: list[Batch], setting: Training, plan: Plan
) -> None:
    """Run a device's training process once, as its agent does."""
    adapter = initial_adapter(describe_model(str(model)).modules, RANK, SCALE, seed=0)
    with TrainingProcess() as process:
        process.call("open", model=model, text=Text((text,), 0), plan=plan)
        process.call("load", trained=adapter, frozen=None)
        clock, found.losses = Clock(process.pid), []

        def on_step(step: tuple[int, float]) -> bool:
            found.losses.append(step[1])
            clock.step(found, batches[step[0] - 1].tokens, first=step[0] == 1)
            return False

        process.call(
            "train",
            on_progress=on_step,
            stream="bench",
            settings=setting,
            learning_rate=setting.learning_rate,
            pruning=None,
        )
        floor_mib, above_mib = process.call("memory")
        found.peaks_mib.append(floor_mib + above_mib)


@contextmanager
def child(target: Any, *arguments: Any) -> Iterator[tuple[int, Any]]:
    """Run a function in a fresh process with one end of a pipe before its arguments."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield process.pid, ours
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()


def ways(threads: int) -> list[Way]:
    """Return what is measured, the plain loop before what is compared with it."""

    def plan(dtype: str, *, checkpointing: bool = False) -> Plan:
        # Who makes blocks again is short of memory; who does not has room, and may keep some.
        budget_mib = 0.0 if checkpointing else AMPLE_MIB
        return Plan(RANK, RANK, ROWS, LENGTH, checkpointing, dtype, threads, 0.0, budget_mib)

    found = [Way(PLAIN, None, "even")]
    if native_bf16(measure_profile()):
        found += [
            Way("bf16", plan("bf16"), "even"),
            Way("bf16, checkpointing", plan("bf16", checkpointing=True), "even"),
        ]
    found += [
        Way("f32", plan("f32"), "even"),
        Way("f32, checkpointing", plan("f32", checkpointing=True), "even"),
        Way(f"{PLAIN}, uneven text", None, "uneven"),
    ]
    packed = next(way for way in found[1:] if way.plan is not None)
    return [*found, Way(f"{packed.name}, uneven text", packed.plan, "uneven")]


def claims(found: dict[str, Found]) -> list[Claim]:
    """Return the claims of the ways that were measured here."""
    made = []

    def claim(name: str, speed: float | None = None, peak: float | None = None) -> None:
        if name not in found:
            return
        plain = found[f"{PLAIN}, uneven text" if "uneven" in name else PLAIN]
        mine = found[name]
        if speed is not None:
            ratio = mine.speed / plain.speed
            made.append(
                Claim(f"{name}: tokens/s, of the plain loop's", ratio, f"≥ {speed}", ratio >= speed)
            )
        if peak is not None:
            share = mine.peak_mib / plain.peak_mib
            made.append(
                Claim(f"{name}: peak, of the plain loop's", share, f"≤ {peak}", share <= peak)
            )
        apart = abs(mine.losses[-1] / plain.losses[-1] - 1)
        made.append(Claim(f"{name}: last loss apart", apart, "≤ 0.01", apart <= 0.01))

    claim("bf16", speed=1.6, peak=0.6)
    claim("bf16, checkpointing", speed=0.8, peak=0.28)
    claim("f32", speed=1.05, peak=0.8)
    claim("f32, checkpointing", peak=0.5)
    claim("bf16, uneven text", speed=2.5)
    return made


def row(name: str, one: Found, floors: dict[str, tuple[float, float]]) -> str:
    """Return what a way took in words, seconds and floor of processor time."""
    floor = floors["bf16" if name.startswith("bf16") else "f32"][1]
    return (
        f"{name:25} {one.speed:5.0f} tokens/s, {one.processor_speed:5.0f} a processor second, "
        f"{one.peak_mib:5.0f} MiB, step {median(one.processor):5.2f} s, floor {floor:5.2f} s, "
        f"last loss {one.losses[-1]:.4f}"
    )


def main() -> None:
    """Measure, print a table, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each way")
    parser.add_argument("--runs", type=int, default=5, help="of each way")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--steps", type=int, default=4, help="of each run")
    options = parser.parse_args()
    found: dict[str, Found] = {}
    setting = Training(
        steps=options.steps, tokens_per_step=ROWS * LENGTH, max_tokens=LENGTH,
        learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        make_model(model)
        texts = write_texts(Path(folder))
        batches = {name: batches_of(model, text, options.steps) for name, text in texts.items()}
        floors = floors_of(model, options.threads)
        for _ in range(1 if options.quick else options.runs):
            for way in ways(options.threads):
                one = found.setdefault(way.name, Found())
                given = batches[way.text]
                if way.plan is None:
                    run_plain(one, model, given, setting, options.threads)
                else:
                    run_ours(one, model, texts[way.text], given, setting, way.plan)
                print(row(way.name, one, floors), flush=True)
    print("medians of all runs")
    for name, one in found.items():
        print(row(name, one, floors))
    write_claims(
        "train", claims(found), ways={n: asdict(f) for n, f in found.items()}, floors=floors
    )


def floors_of(model: Path, threads: int) -> dict[str, tuple[float, float]]:
    """Return for each dtype the seconds (wall, processor) of a step's products."""
    base = describe_model(str(model))
    config = json.loads((model / "config.json").read_text())
    products = frozen_products(base.modules, config["hidden_size"], config["vocab_size"])
    floors = {}
    for dtype in ("f32", "bf16"):
        with child(floor_seconds, products, ROWS * LENGTH, RANK, dtype, threads) as (_, pipe):
            floors[dtype] = pipe.recv()
    return floors


if __name__ == "__main__":
    main()
