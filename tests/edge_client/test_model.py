"""Folders that hold no model to train: each is refused in one line that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import base_tiny
from edge_client.errors import ModelError
from edge_client.evaluate import evaluate_peft
from edge_client.model import describe_model, load_model, load_tokenizer

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of base-tiny to spoil."""
    return Path(shutil.copytree(base_tiny.PATH, tmp_path / "model"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "can't read"),
        ({"model_type": "nosuch"}, "can't read"),
        ({"model_type": "bert", **SMALL}, "does not predict the next token"),
        ({"model_type": "t5", "d_model": 32}, "does not predict the next token"),
    ],
)
def test_a_configuration_of_something_else(folder: Path, config: object, said: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as caught:
        describe_model(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_short(folder: Path) -> None:
    import torch

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        describe_model(str(folder))
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        load_model(folder, torch.float32)


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="can't load the tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an adapter's folder"):
        evaluate_peft("base-tiny", [tmp_path], [tmp_path], max_tokens=64, seed=0)
