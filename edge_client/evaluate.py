"""Held-out loss of an adapter as anybody would load it: `PeftModel.from_pretrained`, float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.data import evaluation_batches, pack, read_examples, split_examples, tokenize
from edge_client.errors import ModelError
from edge_client.model import find_model, load_model, load_tokenizer


def evaluate_peft(
    model: str, adapter: Path | None, data: Sequence[Path], *, max_tokens: int, seed: int
) -> dict[Path, float]:
    """Return the mean held-out loss of each data path, nats a token.

    Raises:
        ModelError: the model or the adapter can't be loaded.
        DataError: a path holds no usable text.
    """
    import torch
    from peft import PeftModel

    from edge_client.trainer.torch_trainer import attention_mask

    folder = find_model(model)
    net = load_model(folder, torch.float32)
    tokenizer = load_tokenizer(folder)
    if adapter is not None:
        try:
            net = PeftModel.from_pretrained(net, str(adapter))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"can't load the adapter in {adapter}: {error}") from None
    net.eval()
    losses = {}
    for path in data:
        splits = split_examples(read_examples([path]).examples, seed=seed)
        rows = pack(tokenize(splits.held_out, tokenizer, max_tokens=max_tokens), max_tokens, seed=0)
        total, counted = 0.0, 0
        for batch in evaluation_batches(rows, 8):
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
        losses[path] = total / max(counted, 1)
    return losses
