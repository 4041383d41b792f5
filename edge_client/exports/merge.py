"""A base with an adapter merged in, as an ordinary folder of transformers: W + (alpha/r)·B·A."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from edge_client.evaluate import load_adapted
from edge_client.model import load_tokenizer, quiet


@dataclass(frozen=True, slots=True)
class Written:
    """How text is written for a merged model, and where its answers end."""

    tokenizer: Any
    stop_tokens: tuple[int, ...]
    context_tokens: int | None


def write_merged(base: Path, adapter: Path | None, folder: Path) -> Written:
    """Write the merged model in float32, its configuration and its tokenizer into a folder.

    float32, for what an adapter changes is often less than bf16 can tell.

    Raises:
        ModelError: the base, its tokenizer or the adapter can't be loaded, or don't fit each other.
    """
    tokenizer = load_tokenizer(base)
    net: Any = merged(base, adapter)
    # What it was loaded with is changed for training: no cache, no dropout.
    net.config = AutoConfig.from_pretrained(base)
    with quiet():
        net.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    return Written(tokenizer, stop_tokens(net, tokenizer), context_tokens(net))


def merged(base: Path, adapter: Path | None) -> Any:
    """Return the base in float32 with the adapter, if any, merged in.

    Raises:
        ModelError: as `write_merged`.
    """
    net: Any = load_adapted(base, adapter)
    return net if adapter is None else net.merge_and_unload()


def stop_tokens(net: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's own and the tokenizer's end of text."""
    said = net.generation_config.eos_token_id
    many = said if isinstance(said, list) else [said]
    return tuple(sorted({t for t in (*many, tokenizer.eos_token_id) if t is not None}))


def context_tokens(net: Any) -> int | None:
    """Return the longest text that a model takes, in tokens; None where it does not say."""
    found = getattr(net.config, "max_position_embeddings", None)
    return int(found) if found else None
