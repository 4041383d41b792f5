"""Train a model of a few thousand numbers, so that what follows is the base model's own memory.

The first use of torch's operators pages in code, starts thread pools and fills caches: tens of MiB
that belong to the floor and not to the model.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edge_client.data import Batch
from edge_client.plan import Plan
from edge_client.trainer.torch_trainer import STORED, TorchTrainer
from protocol.adapter import initial_adapter
from protocol.messages import Training

TOKENS = 256
HIDDEN = 256
RANK = 4


def warm_up(dtype: str, threads: int) -> None:
    """Run a training step of a tiny Llama with and without checkpointing, and an evaluation."""
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
    model = LlamaForCausalLM(config).to(dtype=STORED[dtype])  # type: ignore[call-arg]
    torch.set_rng_state(generator_state)
    model.requires_grad_(False)
    trainer = TorchTrainer.of(model, dtype=dtype, threads=threads)
    ones = np.ones((1, TOKENS), np.int64)
    segments = np.arange(1, TOKENS + 1)[None] // (TOKENS // 2) + 1
    batch = Batch(ones, ones, np.arange(TOKENS)[None], segments)
    settings = Training(steps=1, tokens_per_step=TOKENS, max_tokens=TOKENS)
    for checkpointing in (False, True):
        plan = Plan(RANK, RANK, 1, TOKENS, checkpointing, dtype, threads, 0.0, 0.0)
        trainer.load(initial_adapter(trainer.shapes, RANK, 1.0, seed=0), None, plan)
        trainer.train(
            repeat(batch),
            settings=settings,
            learning_rate=1e-6,
            pruning=None,
            on_step=lambda step, loss: None,
        )
    trainer.evaluate([batch])
