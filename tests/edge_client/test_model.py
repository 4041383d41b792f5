"""Folders that hold no model to train: each is refused in one line that names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import base_tiny
from edge_client.errors import ModelError
from edge_client.evaluate import evaluate_peft
from edge_client.model import describe_model, find_model, load_model, load_tokenizer
from protocol.broker import free_port

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


def test_a_model_of_a_hub_goes_by_its_id_and_a_folder_by_its_name(
    folder: Path, tmp_path: Path
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(folder, kept / "snapshots" / revision)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)
    ended = subprocess.run(
        [sys.executable, "-m", "edge_client", "describe", "me/tiny"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["name"] == "me/tiny"
    assert describe_model(str(folder)).name == "model"
    assert describe_model("base-tiny").name == "base-tiny"


# -- what is no model here, nor at a hub -----------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """A hub that has nothing, as huggingface.co says it."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def describe(name: str, hub: str, tmp_path: Path) -> str:
    """Return what `describe` says of a model that is not there; its hub is asked at `hub`."""
    ended = subprocess.run(
        [sys.executable, "-m", "edge_client", "describe", name],
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def test_a_model_that_no_hub_has(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        said = describe("nobody/nothing", f"http://127.0.0.1:{hub.server_port}", tmp_path)
        hub.shutdown()
        thread.join()
    assert "'nobody/nothing' is neither a folder on this computer" in said
    assert "the hub has no model of this name" in said
    assert "give its folder" in said


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = describe("nobody/nothing", f"http://127.0.0.1:{free_port()}", tmp_path)
    assert "neither a folder" in said and "the hub can't be reached" in said


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "owner/name"),
        ("a/b/c", "owner/name"),
        ("./here", "owner/name"),
        ("a b/c!", "can't have a model of this name"),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id(name: str, why: str) -> None:
    with pytest.raises(ModelError, match="neither a folder on this computer") as caught:
        find_model(name)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
