"""The loop that a user of transformers and PEFT would write, in a process of its own.

The base in float32, `peft.get_peft_model` over all linear modules, the model's own loss on padded
batches, AdamW. Steps, rate, clipping and first adapter are those of what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edge_client.data import TokenSequence
from edge_client.memory import peak_mib, reset_peak
from protocol.adapter import Adapter
from protocol.messages import Training

Step = Sequence[Sequence[TokenSequence]]
"""The micro-batches of one optimiser step, each some sequences that are padded to the longest."""


def plain_loop(
    connection: Connection,
    model: Path,
    steps: Sequence[Step],
    adapter: Adapter,
    settings: Training,
    threads: int,
) -> None:
    """Train, sending each step's loss when it is done, and at last the peak in MiB."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from edge_client.trainer.torch_trainer import ADAM_BETAS

    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=round(adapter.scale * adapter.rank),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    net: Any = get_peft_model(base, config)
    reset_peak()  # of the base's file, as the training process does
    for name, factors in adapter.layers.items():
        module = net.get_submodule(f"base_model.model.{name}")
        module.lora_A["default"].weight.data = torch.tensor(factors.a)
        module.lora_B["default"].weight.data = torch.tensor(factors.b)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=settings.weight_decay
    )
    net.train()
    for step in steps:
        counted = [sum(_targets(s) for s in sequences) for sequences in step]
        total = 0.0
        for sequences, here in zip(step, counted, strict=True):
            loss = net(**_padded(sequences)).loss * (here / sum(counted))
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        connection.send(total)
    connection.send(peak_mib())


def _targets(sequence: TokenSequence) -> int:
    return int((sequence.labels >= 0).sum())


def _padded(sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    """Return the sequences as rows of one length, with their labels, which are shifted already."""
    import torch

    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    there = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        part = slice(0, len(sequence))
        ids[row, part] = torch.from_numpy(sequence.ids)
        labels[row, part] = torch.from_numpy(sequence.labels)
        there[row, part] = 1
    return {"input_ids": ids, "attention_mask": there, "labels": labels, "shift_labels": labels}
