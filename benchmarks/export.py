"""Exports against the merged model: `python -m benchmarks.export [--quick]`.

The demo's fleet trains an adapter in one process (`--quick`: one of its devices, alone), or
`--adapter` gives one of `--model`; `--data` gives other text. Each form is exported, and compared
with the merged model: perplexity on held-out text, in windows of 256 tokens that are read 64 at a
time as chat reads a prompt; the size of the whole folder; and speed and memory of
`edge-client chat --bench`, in a fresh process each, on one thread. Writes runs/bench/export.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim, write_claims
from benchmarks.quality.demo import demo_simulation
from device_profiles.replay import DEMO_TRAINING
from edge_client.chat.generate import CHUNK
from edge_client.chat.onnx_model import OnnxDecoder
from edge_client.chat.providers import CPU, Candidate
from edge_client.chat.torch_model import TorchDecoder
from edge_client.data import read_examples, split_examples
from edge_client.data.example import Example
from edge_client.exports.manifest import GRAPH, Kind
from edge_client.exports.write import write_export
from edge_client.kept import GLOBAL, NONE, Kept, find_adapter
from edge_client.model import BASE_TINY, describe_model, find_model, load_tokenizer
from edge_client.storage import keep_adapter

WINDOW_TOKENS = 256
WORSE, SMALLER = 1.02, 0.30
"""Perplexity and size, by the merged model's."""
KINDS: tuple[Kind, ...] = ("merged", "onnx", "onnx-int8")
PROMPT = "What does this Python code do?"


class Computing(Protocol):
    """What a decoder of either backend can do."""

    def compute(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens, and return the logits (new, vocabulary) after each."""

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one form came to; peaks and speeds are medians."""

    kind: str
    size_bytes: int
    perplexity: float
    by_token: float
    """Perplexity of some windows, a token at a time as chat writes."""
    prefill_tokens_s: float
    decode_tokens_s: float
    first_token_s: float
    peak_mib: float
    answer: str


def windows(examples: Sequence[Example], model: str, most: int) -> NDArray[np.int64]:
    """Return at most `most` windows (n, WINDOW_TOKENS) of the texts, one after the other."""
    tokenizer = load_tokenizer(find_model(model))
    ids: list[int] = []
    for example in examples:
        text = tokenizer(str(example.payload), add_special_tokens=False, verbose=False)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        before, after = ([] if end is None else [end] for end in ends)
        ids += [*before, *text["input_ids"], *after]
    rows = len(ids) // WINDOW_TOKENS
    return np.asarray(ids[: rows * WINDOW_TOKENS]).reshape(rows, WINDOW_TOKENS)[:most]


def perplexity(decoder: Computing, rows: NDArray[np.int64], chunk: int) -> float:
    """Return exp of the mean of −log p(next token) over all windows, read `chunk` at a time."""
    total = 0.0
    for row in rows:
        decoder.keep(0)
        parts = (row[start : start + chunk] for start in range(0, len(row), chunk))
        logits = np.concatenate([decoder.compute(part.tolist()) for part in parts])[:-1]
        exact = logits.astype(np.float64)
        exact -= exact.max(1, keepdims=True)
        known = exact[np.arange(len(exact)), row[1:]]
        total += float((np.log(np.exp(exact).sum(1)) - known).sum())
    return math.exp(total / (rows.size - len(rows)))


def trained(folder: Path, quick: bool) -> tuple[Kept, list[Example]]:
    """Return an adapter that the demo's fleet has trained, and its held-out text."""
    fleet = demo_simulation(0)
    job = fleet.job(rounds=6, training=DEMO_TRAINING)
    device = fleet.devices[0]
    adapter = fleet.alone(job, device) if quick else fleet.federated(job)
    keep_adapter(adapter, folder / "adapter", describe_model(BASE_TINY))
    held_out = [e for d in ([device] if quick else fleet.devices) for e in d.splits.held_out]
    return find_adapter(GLOBAL, folder), held_out


def answers(folder: Path, *options: object) -> str:
    """Run `edge-client chat` on an export in a process of its own, and return what it prints."""
    command = [sys.executable, "-m", "edge_client", "chat", folder, "--threads", 1, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measure(kind: Kind, folder: Path, rows: NDArray[np.int64], repeats: int) -> Measured:
    """Measure one export."""
    decoder: Computing
    if kind == "merged":
        decoder = TorchDecoder(folder, None, 1)
    else:
        decoder = OnnxDecoder(folder / GRAPH, [Candidate(CPU)], 1)
    runs: list[dict[str, Any]] = [
        json.loads(answers(folder, "--bench", "--json", "--max-tokens", 128))
        for _ in range(repeats)
    ]
    return Measured(
        kind,
        sum(path.stat().st_size for path in folder.iterdir()),
        perplexity(decoder, rows, CHUNK),
        perplexity(decoder, rows[:4], 1),
        median(run["prefill_tokens_s"] for run in runs),
        median(run["decode_tokens_s"] for run in runs),
        median(run["first_token_s"] for run in runs),
        median(run["peak_mib"] for run in runs),
        answers(folder, "--temperature", 0, "--max-tokens", 32, "--prompt", PROMPT).strip(),
    )


def claims(found: dict[str, Measured]) -> list[Claim]:
    """Return what is claimed of the forms, by the merged model."""
    merged, int8 = found["merged"], found["onnx-int8"]
    worse, smaller = int8.perplexity / merged.perplexity, int8.size_bytes / merged.size_bytes
    worse_by_token = int8.by_token / merged.by_token
    same = found["onnx"].perplexity / merged.perplexity
    spoke = all(one.answer for one in found.values())
    alike = found["onnx"].answer == merged.answer
    return [
        Claim("int8: perplexity, of merged", worse, f"≤ {WORSE}", worse <= WORSE),
        Claim("int8, by token", worse_by_token, f"≤ {WORSE}", worse_by_token <= WORSE),
        Claim("int8: size, of merged", smaller, f"≤ {SMALLER}", smaller <= SMALLER),
        Claim("onnx: perplexity, of merged", same, "within 1e-4", abs(same - 1) <= 1e-4),
        Claim("each form answers", str(spoke), "yes", spoke),
        Claim("onnx answers as torch does", str(alike), "yes", alike),
    ]


def show(found: dict[str, Measured]) -> None:
    """Print what was measured."""
    table = Table(title="exports", title_justify="left")
    headings = (
        "form",
        "MB",
        "perplexity",
        "by token",
        "read, tokens/s",
        "write",
        "first, s",
        "MiB",
    )
    for heading in headings:
        table.add_column(heading)
    for one in found.values():
        table.add_row(
            one.kind,
            f"{one.size_bytes / 1e6:.2f}",
            f"{one.perplexity:.3f}",
            f"{one.by_token:.3f}",
            f"{one.prefill_tokens_s:.0f}",
            f"{one.decode_tokens_s:.0f}",
            f"{one.first_token_s:.3f}",
            f"{one.peak_mib:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Measure, print, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one device's adapter, 20 windows")
    parser.add_argument("--model", default=BASE_TINY, help="base model, with --data")
    parser.add_argument("--adapter", default=NONE, help="a PEFT folder of that base")
    parser.add_argument("--data", type=Path, help="text whose held-out part is read")
    parser.add_argument("--repeats", type=int, default=3, help="processes that measure speed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.data:
            kept = find_adapter(args.adapter, folder)
            examples = split_examples(read_examples([args.data]).examples, seed=0).held_out
        else:
            kept, examples = trained(folder, args.quick)
        rows = windows(examples, args.model, 20 if args.quick else 200)
        found: dict[str, Measured] = {}
        for kind in KINDS:
            write_export(kept, args.model, folder / kind, kind)
            found[kind] = measure(kind, folder / kind, rows, 1 if args.quick else args.repeats)
    show(found)
    details = {kind: asdict(one) for kind, one in found.items()}
    write_claims("export", claims(found), windows=len(rows), quick=args.quick, forms=details)


if __name__ == "__main__":
    main()
