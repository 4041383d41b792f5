"""Pre-train base-tiny from scratch on the CPU: ``python -m base_tiny.train --out DIR``.

The loop is a plain one: packed sequences of 256 tokens, AdamW, a linear warm-up and a cosine
decay to zero. The number of steps is fixed before the first real step, either by ``--steps``
or from a short speed measurement, so that the learning rate always completes its decay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from base_tiny.data import Data, Ids, load_data
from base_tiny.tokenizer import BOS, END, EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE, save_tokenizer

CONTEXT = 1024
"""Positions the model is built for; it is trained on shorter sequences."""


@dataclass(frozen=True)
class Settings:
    """Hold the choices of one training run."""

    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    intermediate: int = 512
    sequence: int = 256  # tokens
    batch: int = 8  # sequences
    peak_lr: float = 3e-3
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    held_out: float = 0.015  # share of documents
    corpus_scale: float = 1.0
    seed: int = 1
    autocast: bool = True  # bf16 matrix products; faster on CPUs with AVX512-BF16


def quick_settings() -> Settings:
    """Return settings for a model that is made in about a minute, for tests."""
    return Settings(
        hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, warmup=20, corpus_scale=0.06
    )


def build_model(settings: Settings) -> LlamaForCausalLM:
    """Build the untrained model, with smaller weights where a residual branch ends."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        intermediate_size=settings.intermediate,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    # Each layer adds to the residual stream twice; keep its variance from growing with depth.
    scale = 1 / math.sqrt(2 * settings.layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(scale)
    return model


def batches(tokens: Ids, settings: Settings) -> Iterator[torch.Tensor]:
    """Yield batches of shape (batch, sequence + 1) for ever, in a new order every epoch."""
    length = settings.sequence
    epoch = 0
    while True:
        random = np.random.default_rng((settings.seed, epoch))
        # Another offset every epoch cuts the documents at other places.
        offset = int(random.integers(length))
        starts = np.arange(offset, len(tokens) - length, length)
        random.shuffle(starts)
        for first in range(0, len(starts) - settings.batch + 1, settings.batch):
            rows = starts[first : first + settings.batch, None] + np.arange(length + 1)
            yield torch.from_numpy(tokens[rows])
        epoch += 1


def next_token_loss(
    model: torch.nn.Module, window: torch.Tensor, autocast: bool = False
) -> torch.Tensor:
    """Return the mean loss, in nats per token, of a window of shape (batch, sequence + 1)."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def held_out_loss(
    model: torch.nn.Module, tokens: Ids, sequence: int, most: int | None = None
) -> float:
    """Return the held-out loss in nats per token, on at most `most` windows (all if None)."""
    starts = np.arange(0, len(tokens) - sequence, sequence)[:most]
    total = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(starts), 32):
            rows = starts[first : first + 32, None] + np.arange(sequence + 1)
            total += float(next_token_loss(model, torch.from_numpy(tokens[rows]))) * len(rows)
    model.train()
    return total / len(starts)


def build_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Build AdamW, with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, done: float, settings: Settings) -> float:
    """Return a step's rate: a linear warm-up times a cosine decay, which ends with done = 1.

    done is the share of the run that is behind us, from 0 to 1.
    """
    warmup = min(1.0, (step + 1) / settings.warmup)
    return settings.peak_lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    window: torch.Tensor,
    rate: float,
    settings: Settings,
) -> float:
    """Take one optimizer step and return its loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = next_token_loss(model, window, autocast=settings.autocast)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    return float(loss.detach())


def measure_step(model: LlamaForCausalLM, data: Data, settings: Settings) -> float:
    """Return the seconds that one step takes, and leave the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, settings)
    stream = batches(data.train, settings)
    for _ in range(3):
        train_step(model, optimizer, next(stream), 0.0, settings)
    started = time.perf_counter()
    for _ in range(8):
        train_step(model, optimizer, next(stream), 0.0, settings)
    seconds = (time.perf_counter() - started) / 8
    model.load_state_dict(before)
    return seconds


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Save the bf16 weights, the configuration and the tokenizer.

    Files are written aside and moved into place one by one, so that no reader meets half a file.
    """
    staging = folder / ".staging"
    staging.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True
    # A dialogue's answer stops at <|end|>, a document at <|eos|>.
    stops = [SPECIAL_TOKENS.index(EOS), SPECIAL_TOKENS.index(END)]
    copy.generation_config = GenerationConfig(
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=stops,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    copy.bfloat16()
    copy.save_pretrained(str(staging))
    save_tokenizer(tokenizer, staging, CONTEXT)
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only
        os.replace(path, folder / path.name)
    staging.rmdir()


def round_to_bf16(model: torch.nn.Module) -> None:
    """Round the fp32 weights, in place, to the values that bf16 can hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def run_steps(
    model: LlamaForCausalLM,
    data: Data,
    settings: Settings,
    steps: int,
    options: argparse.Namespace,
) -> int:
    """Run the training loop, with a progress line every 50 steps; return the steps taken.

    The run is `steps` long. Should the machine turn out slower than that, a deadline hurries the
    schedule (not the weights): the rate then decays with the time, and still ends at zero.
    """
    optimizer = build_optimizer(model, settings)
    stream = batches(data.train, settings)
    deadline = 60 * (options.deadline or math.inf)  # seconds
    started = time.perf_counter()
    recent: list[float] = []
    step, done = 0, 0.0
    while done < 1:
        rate = learning_rate(step, done, settings)
        recent.append(train_step(model, optimizer, next(stream), rate, settings))
        step += 1
        seconds = time.perf_counter() - started
        done = max(step / steps, seconds / deadline)
        if step % 50 == 0 or done >= 1:
            speed = step * settings.batch * settings.sequence / seconds
            print(
                f"step {step}/{steps} loss {sum(recent) / len(recent):.4f} lr {rate:.2e} "
                f"{speed:,.0f} tokens/s {seconds / 60:.1f} min",
                flush=True,
            )
            recent.clear()
        if step % 500 == 0 and done < 1:
            loss = held_out_loss(model, data.held, settings.sequence, most=96)
            print(f"step {step}/{steps} held-out loss {loss:.4f} (96 windows)", flush=True)
        if options.save_every and step % options.save_every == 0 and done < 1:
            save_model(model, data.tokenizer, options.out)
    return step


def report(
    model: LlamaForCausalLM, data: Data, settings: Settings, steps: int, train_seconds: float
) -> dict[str, object]:
    """Evaluate the (rounded) model on all held-out text and sum the run up."""
    loss = held_out_loss(model, data.held, settings.sequence)
    bits_per_byte = loss / math.log(2) * len(data.held) / data.held_bytes
    tokens = steps * settings.batch * settings.sequence
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_bytes": data.train_bytes,
        "train_tokens": len(data.train),
        "held_out_bytes": data.held_bytes,
        "held_out_tokens": len(data.held),
        "steps": steps,
        "tokens_seen": tokens,
        "epochs": round(tokens / len(data.train), 3),
        "train_minutes": round(train_seconds / 60, 1),
        "tokens_per_second": round(tokens / train_seconds),
        "held_out_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(bits_per_byte, 4),
        "settings": asdict(settings),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m base_tiny.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model files")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time (default 25)")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument("--deadline", type=float, help="minutes after which to have finished")
    parser.add_argument("--quick", action="store_true", help="a much smaller model in a minute")
    parser.add_argument("--peak-lr", type=float, help="peak learning rate")
    parser.add_argument("--batch", type=int, help="sequences in a batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-autocast", action="store_true", help="train in fp32 throughout")
    parser.add_argument("--cache", type=Path, help="folder that keeps the tokens between runs")
    parser.add_argument("--save-every", type=int, default=0, help="steps between saves (0: never)")
    return parser.parse_args(arguments)


def choose_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that the command line asks for."""
    base = quick_settings() if options.quick else Settings()
    return replace(
        base,
        seed=options.seed,
        autocast=not options.no_autocast,
        peak_lr=options.peak_lr or base.peak_lr,
        batch=options.batch or base.batch,
    )


def main(arguments: list[str] | None = None) -> int:
    """Make the model and write it, with training.json, to the output folder."""
    options = parse_arguments(arguments)
    settings = choose_settings(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(settings.seed)
    data = load_data(settings.corpus_scale, settings.held_out, settings.seed, options.cache)
    print(
        f"training text {data.train_bytes:,} bytes, {len(data.train):,} tokens; "
        f"held out {data.held_bytes:,} bytes, {len(data.held):,} tokens",
        flush=True,
    )
    model = build_model(settings)
    steps = options.steps
    if steps is None:
        minutes = min(options.minutes, 0.4) if options.quick else options.minutes
        steps = max(1, int(minutes * 60 / measure_step(model, data, settings)))
    started = time.perf_counter()
    steps = run_steps(model, data, settings, steps, options)
    seconds = time.perf_counter() - started
    round_to_bf16(model)
    save_model(model, data.tokenizer, options.out)
    summary = report(model, data, settings, steps, seconds)
    (options.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
