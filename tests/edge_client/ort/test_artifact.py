"""An artifact set: what is in it, what a damaged one says, and what is loaded to train with it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import base_tiny
from edge_client.errors import ConfigError, ModelError, StorageError
from edge_client.model import describe_model, model_hash
from edge_client.ort.artifact import check_artifact, map_weight
from edge_client.ort.runtime import REPAIR, _why_not_installed, _why_plain, missing_training
from edge_client.trainer.onnx_trainer import OnnxTrainer
from protocol.artifact import FILES, MANIFEST, WEIGHTS
from tests.edge_client.ort.artifacts import exported, needs_onnx
from tests.edge_client.test_torch_trainer import gpt2, llama, tiny

pytestmark = pytest.mark.timeout(300)


@needs_onnx
def test_the_manifest_says_what_a_job_says_of_the_model() -> None:
    artifact = check_artifact(exported(tiny)[1])
    base = describe_model("base-tiny")
    assert artifact.base_sha256 == base.sha256
    assert artifact.modules == base.modules
    assert artifact.opset == 16 and artifact.versions["onnxruntime-training-cpu"] == "1.19.2"
    assert artifact.files.keys() == set(FILES)


@needs_onnx
def test_the_base_lies_beside_the_graph_and_once() -> None:
    model, folder = exported(tiny)
    weights = (folder / WEIGHTS).stat().st_size
    parameters = describe_model("base-tiny").parameters
    assert 4 * parameters <= weights < 4 * parameters + 20_000
    assert (folder / "train.onnx").stat().st_size < 1_000_000
    head = map_weight(folder / WEIGHTS, check_artifact(folder).head)
    assert head.shape == (2048, 192) and model == base_tiny.PATH


@needs_onnx
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / MANIFEST).unlink(), "can't read .*manifest.json: No such file"),
        (lambda f: (f / MANIFEST).write_text("{"), "is no manifest"),
        (lambda f: (f / MANIFEST).write_text('{"format": 2}'), "is no manifest"),
        (lambda f: (f / WEIGHTS).unlink(), "can't read .*weights.safetensors"),
        (lambda f: shutil.copy(f / MANIFEST, f / WEIGHTS), "weights.safetensors is not what"),
        (lambda f: shutil.copy(f / WEIGHTS, f / "train.onnx"), "train.onnx is not what"),
    ],
)
def test_a_damaged_set_says_which_file_and_what_to_do(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(llama)[1], tmp_path / "set"))
    damage(folder)
    with pytest.raises(ModelError, match=f"{words}.*edge-client export-onnx"):
        check_artifact(folder)


@needs_onnx
def test_an_export_that_stops_half_way_leaves_the_earlier_set_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_client.ort import export

    folder = Path(shutil.copytree(exported(llama)[1], tmp_path / "set"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full: an artifact set can't be kept"):
        export.export_artifact(str(exported(llama)[0]), folder)
    assert check_artifact(folder).name == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@needs_onnx
@pytest.mark.parametrize("has_manifest", [False, True])
def test_a_base_model_is_not_written_over(tmp_path: Path, has_manifest: bool) -> None:
    from edge_client.ort.export import export_artifact

    folder = Path(shutil.copytree(base_tiny.PATH, tmp_path / "bt"))
    if has_manifest:  # of an export of a time when it was written over
        shutil.copy(exported(llama)[1] / MANIFEST, folder)
    before = model_hash(folder)
    with pytest.raises(ConfigError, match="holds something else than an artifact set"):
        export_artifact(str(folder), folder)
    assert model_hash(folder) == before and not (folder / WEIGHTS).exists()


@needs_onnx
def test_an_export_is_for_all_to_read_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    from edge_client.ort.export import export_artifact

    folder = Path(shutil.copytree(exported(llama)[1], tmp_path / "set"))
    before = os.umask(0o022)
    try:
        export_artifact(str(exported(gpt2)[0]), folder)
    finally:
        os.umask(before)
    assert check_artifact(folder).name == "gpt2"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@needs_onnx
def test_a_place_that_cant_be_written_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_client.ort import export

    monkeypatch.setattr(export, "load_model", None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can't write an artifact set to .*: Not a directory"):
        export.export_artifact("base-tiny", tmp_path / "file")
    with pytest.raises(StorageError, match="name a folder that can be written to with --out"):
        export.export_artifact("base-tiny", Path("/proc/x"))


@needs_onnx
def test_training_loads_neither_torch_nor_transformers() -> None:
    folder = exported(llama)[1]
    code = f"""
import sys
from pathlib import Path
from edge_client.plan import Plan
from edge_client.trainer.worker import Text, Worker
from protocol.adapter import initial_adapter
from protocol.messages import Training

worker = Worker(lambda value: None)
plan = Plan(4, 8, 1, 32, False, "f32", 1, 0.0, 0.0, backend="onnx")
text = Path({str(folder)!r}) / "text.txt"
text.write_text("\\n\\n".join(f"line {{i}} of a text to be learnt" for i in range(99)))
try:
    print(worker.open(Path({str(folder)!r}), Text((text,), 0), plan).train_tokens)
except IndexError:  # of ids that this model's small vocabulary does not have
    pass
print([n for n in ("torch", "transformers", "peft", "onnx") if sys.modules.get(n)])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "[]"


@needs_onnx
def test_what_can_train_here_says_nothing() -> None:
    assert missing_training() == ""


def test_where_there_is_no_wheel_it_says_so_and_what_to_do() -> None:
    pi = _why_not_installed("Linux", "aarch64", (3, 11))
    assert "no onnxruntime-training-cpu for Linux on aarch64" in pi and "--backend torch" in pi
    assert "Python 3.13" in _why_not_installed("Linux", "x86_64", (3, 13))
    assert "pip install onnxruntime-training-cpu" in _why_not_installed("Linux", "x86_64", (3, 11))


def test_a_plain_onnxruntime_is_no_mistake_where_there_is_no_other() -> None:
    assert "--backend torch" in _why_plain("Linux", "aarch64", (3, 11), over=False)
    assert REPAIR not in _why_plain("Linux", "x86_64", (3, 13), over=False)
    assert REPAIR in _why_plain("Linux", "x86_64", (3, 11), over=False)


def test_a_plain_onnxruntime_over_the_wheel_for_training_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "__init__.py").write_text("from onnxruntime import capi\n")
    (package / "capi" / "__init__.py").write_text("from onnxruntime.capi import _pybind_state\n")
    (package / "capi" / "_pybind_state.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    code = "from edge_client.ort.runtime import missing_training; print(missing_training())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a plain onnxruntime" in answer.stdout and REPAIR in answer.stdout, answer.stderr


@needs_onnx
def test_a_model_whose_head_does_more_is_refused(tmp_path: Path) -> None:
    from transformers import CohereConfig

    from edge_client.ort.export import export_artifact
    from tests.edge_client.test_torch_trainer import save_random

    config = CohereConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, logit_scale=0.1,
    )  # fmt: skip
    save_random(config, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_tiny.PATH / name, tmp_path / "model")
    with pytest.raises(ModelError, match=r"does more than multiply.*--backend torch"):
        export_artifact(str(tmp_path / "model"), tmp_path / "onnx")


@needs_onnx
def test_the_command_makes_a_set_that_trains(tmp_path: Path) -> None:
    model = exported(gpt2)[0]
    command = [sys.executable, "-m", "aggregator", "export-onnx", str(model), "--out"]
    answer = subprocess.run([*command, tmp_path / "set"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "edge-client run --onnx set" in answer.stdout and not answer.stderr
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    assert manifest["files"] == json.loads((exported(gpt2)[1] / MANIFEST).read_text())["files"]
    check_artifact(tmp_path / "set")
    assert OnnxTrainer(tmp_path / "set", threads=1).shapes
