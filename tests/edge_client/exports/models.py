"""Models, a device's state and exports for tests, each made once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from edge_client.backends import ONNX_EXPORT_PACKAGES, _is_there
from edge_client.exports.manifest import FOLDER, Kind
from edge_client.exports.write import write_export
from edge_client.kept import GLOBAL, NONE, Kept, find_adapter
from edge_client.model import BASE_TINY, describe_model
from edge_client.storage import keep_adapter
from tests.edge_client.data.test_tokenize import make_tokenizer
from tests.edge_client.test_torch_trainer import random_adapter

needs_optimum = pytest.mark.skipif(
    not all(_is_there(name) for name in ONNX_EXPORT_PACKAGES), reason="optimum is not installed"
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def llama() -> Path:
    """Return a random Llama with grouped-query attention, a head of its own and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = _folder("llama")
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    net = LlamaForCausalLM(config)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4  # so that it has something to say
    net.save_pretrained(folder)
    make_tokenizer(template=TEMPLATE).save_pretrained(folder)
    return folder


@cache
def gpt2() -> Path:
    """Return a random GPT-2: its weights lie the other way round, its positions are a table."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = _folder("gpt2")
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@cache
def state() -> Path:
    """Return the state folder of a device with a shared adapter and its own, of base-tiny."""
    folder, base = _folder("state"), describe_model(BASE_TINY)
    for seed, name in ((1, "common"), (2, "adapter")):
        keep_adapter(random_adapter(base.modules, 4, size=0.02, seed=seed), folder / name, base)
    return folder


@cache
def exported(kind: Kind, adapter: str = GLOBAL) -> Path:
    """Return an export of the device's, in its state folder."""
    place = state() / FOLDER / f"{adapter}-{kind}"
    write_export(find_adapter(adapter, state()), "", place, kind)
    return place


@cache
def exported_base(base: Path, kind: Kind) -> Path:
    """Return an export of a base alone."""
    place = _folder(f"{base.name}-{kind}") / "out"
    write_export(Kept(NONE, None, "", "", ""), str(base), place, kind)
    return place


def edge_client(
    *arguments: object, stdin: str | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that says at its end which heavy libraries it has loaded."""
    code = f"""
import atexit, sys
{before}
heavy = ("torch", "transformers", "peft", "optimum", "onnx", "onnxruntime")
atexit.register(lambda: print([n for n in heavy if sys.modules.get(n)], file=sys.stderr))
from edge_client.cli import main
sys.argv = {["edge-client", *map(str, arguments)]!r}
main()
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        input=stdin,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"},
    )


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tunefleet-exports-")


def _folder(name: str) -> Path:
    folder = Path(_temporary().name) / name
    folder.mkdir()
    return folder
