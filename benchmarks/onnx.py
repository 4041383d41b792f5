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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

import base_tiny
from benchmarks.claims import Claim, write_claims

LENGTH, RANK, SCALE, RATE = 128, 8, 2.0, 1e-3
ROWS, FIRST_STEPS = 8, 3
PEAK, START, SPEED = 0.40, 0.35, 0.80
"""Shares of plain PEFT's."""
BACKENDS = ("plain", "torch", "onnx")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process took."""

    peak_mib: float
    start_s: float
    tokens_s: float


# -- in a process of its own -----------------------------------------------------------------------


def child(
    backend: str, model: Path, vocabulary: int, threads: int, steps: int, start: float
) -> None:
    """Train and print what it took as JSON; `start` is when the process was started."""
    ends: list[float] = []

    def on_step() -> None:
        ends.append(time.time())

    if backend == "plain":
        train_plain(model, vocabulary, threads, steps, on_step)
    else:
        train_ours(backend, model, vocabulary, threads, steps, on_step)
    from edge_client.memory import peak_mib

    took = np.diff(ends[FIRST_STEPS - 1 :])
    found = Measured(peak_mib(), ends[0] - start, LENGTH / statistics.median(took))
    print(json.dumps(asdict(found)))


def train_plain(
    model: Path, vocabulary: int, threads: int, steps: int, on_step: Callable[[], None]
) -> None:
    """Train as anybody would with transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules="all-linear")
    adapted = get_peft_model(base, config)
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=RATE)
    for ids in islice(cycle(texts(vocabulary)), steps):
        row = torch.from_numpy(ids[None].astype(np.int64))
        adapted(input_ids=row, labels=row).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        on_step()


def train_ours(
    backend: Any,
    model: Path,
    vocabulary: int,
    threads: int,
    steps: int,
    on_step: Callable[[], None],
) -> None:
    """Train as a device's training process does."""
    from edge_client.data import BatchStream, TokenSequence, pack
    from edge_client.memory import make_peaks_predictable, restrain_libraries
    from edge_client.plan import Plan
    from edge_client.trainer.backend import open_tokenizer, open_trainer
    from protocol.adapter import initial_adapter
    from protocol.messages import Training

    restrain_libraries()
    make_peaks_predictable()
    tokenizer = open_tokenizer(backend, model)
    rows = pack(
        [TokenSequence(t, np.append(t[1:], -100)) for t in texts(vocabulary)], LENGTH, seed=0
    )
    trainer = open_trainer(backend, model, dtype="f32", threads=threads)
    plan = Plan(RANK, RANK, 1, LENGTH, False, "f32", threads, 0.0, 0.0, backend=backend)
    trainer.load(initial_adapter(trainer.shapes, RANK, SCALE, 0), None, plan)
    trainer.train(
        BatchStream(rows, 1, seed=0),
        settings=Training(steps=steps, tokens_per_step=LENGTH, max_tokens=LENGTH),
        learning_rate=RATE,
        pruning=None,
        on_step=lambda step, loss: on_step(),
    )
    del tokenizer  # it has been there all the time, as on a device


def texts(vocabulary: int) -> Any:
    """Return rows (n, 128) of random tokens."""
    drawn = np.random.default_rng(0).integers(3, vocabulary, (ROWS, LENGTH))
    return drawn.astype(np.int32)


# -- all of them -----------------------------------------------------------------------------------


def measure(backend: str, model: Path, vocabulary: int, *, threads: int, steps: int) -> Measured:
    """Train in a fresh process and return what it took."""
    what = [backend, str(model), str(vocabulary), str(threads), str(steps), repr(time.time())]
    command = [sys.executable, "-m", "benchmarks.onnx", "--child", *what]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return Measured(**json.loads(answer.stdout.strip().splitlines()[-1]))


def make_15m(folder: Path) -> Path:
    """Save a random Llama of the shape of llama2.c's 15 M model, with base-tiny's tokenizer."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_tiny.PATH / name, folder)
    return folder


def compare(name: str, model: Path, vocabulary: int, artifact: Path, args: Any) -> list[Claim]:
    """Measure the backends in turn, print medians, and return the claims about them."""
    from edge_client.ort.export import export_artifact

    export_artifact(str(model), artifact)
    runs: dict[str, list[Measured]] = {backend: [] for backend in BACKENDS}
    for _ in range(args.repeats):
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


def main() -> None:
    """Measure, print tables, write the claims."""
    if sys.argv[1:2] == ["--child"]:
        backend, model, vocabulary, threads, steps, start = sys.argv[2:]
        child(backend, Path(model), int(vocabulary), int(threads), int(steps), float(start))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each backend")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        claims = [
            *compare("base-tiny", base_tiny.PATH, 2048, base / "tiny", args),
            *compare("15 M", make_15m(base / "model"), 32000, base / "15m", args),
        ]
    write_claims("onnx", claims, **vars(args))


if __name__ == "__main__":
    main()
