"""Held-out loss of adapters as anybody would load them: `PeftModel.from_pretrained`, float32."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.data import (
    PackedRow,
    evaluation_batches,
    pack,
    read_examples,
    split_examples,
    tokenize,
)
from edge_client.errors import ModelError
from edge_client.model import find_model, load_model, load_tokenizer
from protocol.errors import os_words
from protocol.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import nn

MICRO_BATCH = 4


def evaluate_peft(
    model: str,
    adapters: Sequence[Path | None],
    data: Sequence[Path],
    *,
    max_tokens: int,
    seed: int,
    max_rows: int | None = None,
) -> list[dict[Path, float]]:
    """Return for each adapter (None: the base) the held-out loss of each path, nats a token.

    Args:
        max_rows: Take no more than that many rows of `max_tokens` of each path (None: all).

    Raises:
        ModelError: the model or an adapter can't be loaded.
        DataError: a path holds no usable text.
    """
    for adapter in adapters:
        # Else PEFT would look for it on a hub, for minutes.
        if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{adapter} has no {ADAPTER_CONFIG}: it is not an adapter's folder")
    folder = find_model(model)
    tokenizer = load_tokenizer(folder)
    rows: dict[Path, list[PackedRow]] = {}
    for path in data:
        reading = read_examples([path])
        splits = split_examples(reading.examples, seed=seed, problems=reading.problems)
        sequences = tokenize(splits.held_out, tokenizer, max_tokens=max_tokens)
        rows[path] = list(islice(pack(sequences, max_tokens, seed=0), max_rows))
    losses = []
    for adapter in adapters:
        net = load_adapted(folder, adapter)
        losses.append({path: _loss(net, held_out) for path, held_out in rows.items()})
    return losses


def load_adapted(folder: Path, adapter: Path | None) -> nn.Module:
    """Load a base model in float32, with the adapter in a PEFT folder if one is given.

    Raises:
        ModelError: the base or the adapter can't be loaded, or they don't fit each other.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    net = load_model(folder, torch.float32)
    if adapter is not None:
        try:
            net = PeftModel.from_pretrained(net, str(adapter))
            fits = _has_all_of(net, adapter)
        except RuntimeError:  # its text has a line for each tensor
            fits = False
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"can't load the adapter in {adapter}: {os_words(error)}") from None
        if not fits:
            raise ModelError(
                f"the adapter in {adapter} does not fit the model in {folder}; give the base model "
                "that it was trained on with --model"
            )
    module: nn.Module = net.eval()
    return module


def _has_all_of(net: nn.Module, adapter: Path) -> bool:
    """Say whether every tensor of an adapter's file has a place: PEFT drops what has none."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():  # another format of PEFT's
        return True
    with safe_open(weights, "np") as file:
        # Left to itself PEFT asks a hub whether the vocabulary has grown, for half a minute.
        return set(file.keys()) <= set(get_peft_model_state_dict(net, save_embedding_layers=False))


def _loss(net: Any, rows: Sequence[PackedRow]) -> float:
    import torch

    from edge_client.trainer.torch_trainer import attention_mask

    total, counted = 0.0, 0
    for batch in evaluation_batches(rows, MICRO_BATCH):
        with torch.no_grad():
            logits = net(
                input_ids=torch.from_numpy(batch.ids),
                position_ids=torch.from_numpy(batch.positions),
                attention_mask=attention_mask(batch, torch.float32),
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="sum"
            )
        total, counted = total + float(loss), counted + batch.tokens
    return total / max(counted, 1)
