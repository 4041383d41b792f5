"""What `benchmarks.onnx` measures, in a process of its own: train, and print what it took.

`python -m benchmarks.onnx_child BACKEND FOLDER VOCABULARY THREADS STEPS START`. Nothing is imported
here that what is measured does not need.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, RANK, SCALE, RATE = 128, 8, 2.0, 1e-3
ROWS, FIRST_STEPS = 8, 3


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
    speed = LENGTH / statistics.median(took)
    print(json.dumps({"peak_mib": peak_mib(), "start_s": ends[0] - start, "tokens_s": speed}))


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


if __name__ == "__main__":
    kind, where, size, count, number, begun = sys.argv[1:]
    child(kind, Path(where), int(size), int(count), int(number), float(begun))
