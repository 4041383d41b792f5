"""Exports compute what the model does, are as small as they say, and refuse what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import base_tiny
from benchmarks.export import SMALLER, WORSE, perplexity, windows
from device_profiles.demo_text import write_demo_text
from edge_client.chat.onnx_model import OnnxDecoder
from edge_client.chat.providers import CPU, Candidate
from edge_client.chat.torch_model import TorchDecoder
from edge_client.cli import app
from edge_client.data import read_examples
from edge_client.errors import ConfigError, ModelError
from edge_client.exports.manifest import GRAPH, MANIFEST, check_export
from edge_client.exports.write import write_export
from edge_client.kept import GLOBAL, NONE, PERSONAL, Kept, find_adapter
from edge_client.model import describe_model
from edge_client.storage import keep_adapter
from tests.edge_client.exports.models import (
    exported,
    exported_base,
    gpt2,
    llama,
    needs_optimum,
    state,
)
from tests.edge_client.test_torch_trainer import random_adapter

IDS = [0, 17, 250, 31, 8, 99, 250, 3, 40, 41, 42]


def onnx(folder: Path) -> OnnxDecoder:
    return OnnxDecoder(folder / GRAPH, [Candidate(CPU)], 1)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_merged_is_a_plain_folder_that_computes_what_the_adapter_does() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported("merged")
    net: Any = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(base_tiny.PATH, dtype=torch.float32)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        alone = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, str(state() / "common"))(input_ids=ids).logits
        found = net(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(found, alone, atol=0.05)
    assert net.dtype == torch.float32
    assert net.config.use_cache  # what training turns off
    assert net.generation_config.eos_token_id == [1, 6]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert check_export(folder).stop_tokens == (1, 6)


@needs_optimum
@pytest.mark.parametrize("make", [llama, gpt2, None])
def test_onnx_computes_what_torch_does_whole_in_parts_and_after_going_back(make: Any) -> None:
    folder = exported("onnx") if make is None else exported_base(make(), "onnx")
    merged = exported("merged") if make is None else make()
    ours, torch = onnx(folder), TorchDecoder(merged, None, 1)
    wanted = torch.compute(IDS)
    np.testing.assert_allclose(ours.compute(IDS), wanted, atol=2e-4, rtol=1e-4)
    for decoder in (ours, torch):
        decoder.keep(0)
        parts = [decoder.compute(IDS[:1]), decoder.compute(IDS[1:7]), decoder.compute([5])]
        decoder.keep(7)  # as if the last had not been
        parts[-1] = decoder.compute(IDS[7:])
        np.testing.assert_allclose(np.concatenate(parts), wanted, atol=2e-4, rtol=1e-4)


@needs_optimum
def test_int8_is_small_and_hardly_worse_on_text_that_nobody_trained_on(tmp_path: Path) -> None:
    write_demo_text(tmp_path, seed=0)
    (part, *_) = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    rows = windows(read_examples([part]).examples, "base-tiny", 12)
    int8, merged = exported("onnx-int8"), exported("merged")
    assert size(int8) <= SMALLER * size(merged)
    wanted = perplexity(TorchDecoder(merged, None, 1), rows, 64)
    assert perplexity(onnx(int8), rows, 64) <= WORSE * wanted
    assert perplexity(onnx(int8), rows[:1], 1) <= WORSE * perplexity(
        TorchDecoder(merged, None, 1), rows[:1], 64
    )


@needs_optimum
@pytest.mark.parametrize("make", [llama, gpt2])
def test_int8_of_an_untied_head_and_of_weights_the_other_way_round(make: Any) -> None:
    import onnx as format

    folder = exported_base(make(), "onnx-int8")
    wanted = TorchDecoder(make(), None, 1).compute(IDS)
    found = onnx(folder).compute(IDS)
    assert np.abs(found - wanted).mean() < 0.05 * wanted.std()
    graph = format.load(folder / GRAPH).graph
    large = [t for t in graph.initializer if np.prod(t.dims) >= 512]
    assert large and all(t.data_type == format.TensorProto.UINT8 for t in large)


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    kept = find_adapter(NONE, state())
    out = tmp_path / "out"
    write_export(kept, "", out, "merged")
    (out / "old").touch()
    write_export(find_adapter(GLOBAL, state()), "", out, "merged")
    assert not (out / "old").exists() and check_export(out).adapter == GLOBAL
    (out / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="holds something else than an export"):
        write_export(kept, "", out, "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_into_the_folder_one_is_in_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_export(find_adapter(NONE, state()), "", out, "merged")
    monkeypatch.chdir(out)
    write_export(find_adapter(GLOBAL, state()), "", Path(), "merged")
    assert check_export(out).adapter == GLOBAL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_built_in_base_is_called_by_its_name(tmp_path: Path) -> None:
    command = ["export", str(tmp_path / "out"), "--adapter", "none", "--model", "base-tiny"]
    done = CliRunner().invoke(app, [*command, "--state", str(tmp_path / "state")])
    assert done.output == f"base-tiny with no adapter, merged, is in {tmp_path / 'out'}\n"
    assert check_export(tmp_path / "out").base == "base-tiny"


def test_a_base_that_is_not_the_adapters_is_refused(tmp_path: Path) -> None:
    kept = find_adapter(PERSONAL, state())
    with pytest.raises(ModelError, match="is not the base 'base-tiny' of the adapter"):
        write_export(kept, str(llama()), tmp_path / "out", "merged")
    # Where nobody has kept the base's hash, shapes and names tell.
    keep_adapter(random_adapter(MODULES, 2), tmp_path / "peft", describe_model(str(llama())))
    (tmp_path / "peft" / "base.json").unlink()
    other = find_adapter(str(tmp_path / "peft"), tmp_path)
    with pytest.raises(ModelError, match="does not fit the model"):
        write_export(other, "base-tiny", tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


MODULES = {f"model.layers.{block}.self_attn.q_proj": (192, 192) for block in (0, 7)}
"""base-tiny has the first, and no eighth block."""


def test_without_an_adapter_somebody_must_say_which_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say which base model with --model"):
        write_export(Kept(NONE, None, "", "", ""), "", tmp_path / "out", "merged")


@needs_optimum
@pytest.mark.parametrize("spoil", ["cut", "missing", "manifest", "field"])
def test_a_damaged_export_is_told(tmp_path: Path, spoil: str) -> None:
    folder = Path(shutil.copytree(exported("onnx"), tmp_path / "export"))
    if spoil == "cut":
        (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:-1000])
    elif spoil == "missing":
        (folder / "tokenizer.json").unlink()
    elif spoil == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        said = json.loads((folder / MANIFEST).read_text()) | {"kind": "int3"}
        (folder / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(ModelError, match="again") as caught:
        check_export(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
