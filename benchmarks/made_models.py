"""Models of known shapes with random weights: what memory and time take depends on shape alone.

Their vocabulary is larger than base-tiny's, whose tokenizer they carry: most of it is never seen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import base_tiny

SHAPES: dict[str, dict[str, int]] = {
    "15M": {
        "vocab_size": 32000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""Name → sizes of a Llama with tied embeddings; 135M is SmolLM2-135M's."""
LONGEST_TOKENS = 2048


def make_model(name: str, folder: Path) -> Path:
    """Write the model `name` of SHAPES into `folder/name`, in bf16 as models come; return that.

    The weights are the same each time, so that what is remembered of a model is found again.
    `base-tiny` is there already.
    """
    if name == "base-tiny":
        return base_tiny.PATH
    import torch
    from safetensors.torch import save_file

    target = folder / name
    if (target / "model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for file in base_tiny.PATH.glob("*token*"):
        shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(_config(SHAPES[name]), indent=1))
    generator = torch.Generator().manual_seed(0)
    weights = {
        parameter: (
            torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator).mul_(0.02)
        ).bfloat16()
        for parameter, shape in _parameters(SHAPES[name]).items()
    }
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _config(shape: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "max_position_embeddings": LONGEST_TOKENS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


def _parameters(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a Llama with their shapes."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for block in range(shape["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{block}.{name}.weight": part for name, part in parts.items()}
    return found
