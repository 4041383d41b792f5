"""Train a model of a few thousand numbers, so that what follows is the base model's own memory.

The first use of torch's operators pages in code, starts thread pools and fills caches: tens of MiB
that belong to the floor and not to the model.
"""

from __future__ import annotations

from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

from edge_client.trainer.loss import chunked_cross_entropy

TOKENS = 256
HIDDEN = 256


def warm_up(dtype: str, threads: int) -> None:
    """Run two training steps and an evaluation of a tiny Llama, with and without checkpointing."""
    torch.set_num_threads(threads)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    generator_state = torch.get_rng_state()
    model = LlamaForCausalLM(config)
    model.to(dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)  # type: ignore[call-arg]
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    loss = partial(_loss, model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        loss()
    torch.set_rng_state(generator_state)


def _loss(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.ones(1, TOKENS, dtype=torch.long)
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=model.dtype)
    positions = torch.arange(TOKENS)[None]
    hidden = model.model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return chunked_cross_entropy(hidden[0], model.get_output_embeddings().weight, ids[0])
