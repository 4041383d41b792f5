"""`edge-client export` and `chat` as an owner runs them, most in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_client.chat.choose import Wish, choose
from edge_client.cli import app
from edge_client.errors import ConfigError
from edge_client.exports.manifest import GRAPH
from edge_client.kept import GLOBAL, PERSONAL
from edge_client.model import describe_model
from edge_client.storage import keep_adapter
from protocol.errors import TunefleetError
from tests.edge_client.chat.test_talk import read_until
from tests.edge_client.exports.models import (
    edge_client,
    exported,
    exported_base,
    gpt2,
    llama,
    needs_optimum,
    state,
)
from tests.edge_client.test_torch_trainer import random_adapter

pytestmark = pytest.mark.timeout(900)  # each is several processes that load libraries
QUESTION = "What does this Python code do?"
GREEDY = ("--temperature", 0, "--max-tokens", 12)
NO_TORCH = "for name in ('torch', 'transformers', 'peft'): sys.modules[name] = None"


@needs_optimum
def test_the_command_exports_and_both_backends_answer_alike() -> None:
    place = state() / "exports" / "global-onnx"
    made = edge_client("export", "--format", "onnx", "--adapter", "global", "--state", state())
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"base-tiny with adapter 'global', onnx, is in {place}\n"
    asked = ("chat", *GREEDY, "--prompt", QUESTION, "--adapter", "global", "--state", state())
    onnx = edge_client(*asked, before=NO_TORCH)
    assert onnx.returncode == 0 and onnx.stdout.strip(), onnx.stderr
    assert onnx.stderr.splitlines() == [
        "base-tiny with adapter 'global', on ONNX Runtime (onnx, CPUExecutionProvider)",
        "['onnxruntime']",
    ]
    torch = CliRunner().invoke(app, [*map(str, asked), "--backend", "torch"])
    assert torch.stdout == onnx.stdout, torch.stderr
    assert "base-tiny with adapter 'global', on torch" in torch.stderr


@needs_optimum
def test_what_is_piped_in_is_answered_and_plain_models_continue_it() -> None:
    folder = exported_base(gpt2(), "onnx")
    found = edge_client("chat", folder, "--seed", 1, "--max-tokens", 5, stdin="hé cat\n")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("no chat template: it continues the text") == 1
    assert len(found.stdout) > 1


@needs_optimum
def test_bench_prints_speed_and_memory_of_either_backend() -> None:
    for folder, said in ((exported_base(llama(), "onnx"), "onnx"), (llama(), "torch")):
        if said == "torch":
            where = ["--model", folder, "--adapter", "none", "--state", folder]
        else:
            where = [folder]
        found = edge_client("chat", *where, "--bench", "--json", "--max-tokens", 9)
        figures = json.loads(found.stdout)
        assert said in figures.pop("runs_on")
        assert figures["new_tokens"] == 9 and figures["prompt_tokens"] == 128
        assert all(value > 0 for value in figures.values())
        assert 20 < figures["peak_mib"] < 4000


@needs_optimum
def test_a_terminal_is_talked_with_until_its_end() -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "edge_client", "chat", exported_base(llama(), "onnx")]
    process = subprocess.Popen(
        [*map(str, command), "--max-tokens", "4", "--temperature", "0"],
        stdin=slave, stdout=slave, stderr=slave,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    said = b""
    for line in (b"the cat\n", b"\n", b"the dog\n", b"\x04"):
        said += read_until(master, b"> ")
        os.write(master, line)
    assert process.wait(60) == 0
    os.close(master)
    text = said.decode(errors="replace")
    assert "the cat" in text and "the dog" in text and "Traceback" not in text


# -- what can't be done is said in one line --------------------------------------------------------


@needs_optimum
def test_mistakes_are_told_in_one_line_each(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported("onnx"), tmp_path / "broken"))
    (broken / GRAPH).write_bytes(b"not a graph")
    nobody = tmp_path / "nobody"
    mistakes: list[tuple[list[object], str]] = [
        (
            ["chat", tmp_path / "gone", "--prompt", "a"],
            "give a folder that edge-client export wrote",
        ),
        (["chat", broken, "--prompt", "a"], "is not what tunefleet.json says"),
        (["chat", exported("onnx"), "--prompt", " \n"], "the text is empty"),
        (["chat", "--adapter", "personal", "--state", nobody], "has no adapter of its own"),
        (["chat", "--adapter", tmp_path / "gone"], "can't read"),
        (["chat", exported("onnx"), "--provider", "QNN"], "has no such provider"),
        (["export", tmp_path / "out", "--state", nobody], "has no adapter yet"),
        (
            ["export", tmp_path / "out", "--state", state(), "--model", llama()],
            "is not the base 'base-tiny' of the adapter",
        ),
    ]
    for arguments, words in mistakes:
        told = CliRunner().invoke(app, [*map(str, arguments)], input="")
        assert isinstance(told.exception, TunefleetError), (arguments, told.exception)
        assert words in str(told.exception) and "\n" not in str(told.exception)
        assert not told.stdout.strip()
    found = edge_client(*mistakes[0][0], stdin="")
    assert found.returncode == 1
    (line, _) = found.stderr.splitlines()
    assert line.startswith("error: ") and mistakes[0][1] in line, line


@needs_optimum
def test_standard_input_that_is_no_text_is_told() -> None:
    command = [sys.executable, "-m", "edge_client", "chat", str(exported("onnx"))]
    found = subprocess.run(
        command, input=b"\xff\xfe", capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert found.returncode == 1 and b"not text in UTF-8" in found.stderr


@needs_optimum
def test_an_export_of_another_adapter_names_the_command_that_makes_the_right_one() -> None:
    folder = exported("onnx")
    with pytest.raises(ConfigError, match=r"edge-client export .*global-onnx --format onnx --ad"):
        choose(Wish(state(), folder, PERSONAL))
    with pytest.raises(ConfigError, match="answers with --backend onnx"):
        choose(Wish(state(), folder, GLOBAL, "torch"))
    assert choose(Wish(state(), folder, GLOBAL)).folder == folder
    elsewhere = Wish(state().parent / "nobody", folder, GLOBAL)  # copied to another computer
    assert choose(elsewhere).folder == folder


@needs_optimum
def test_an_export_of_an_earlier_adapter_is_not_taken_for_the_one_of_today(tmp_path: Path) -> None:
    own = tmp_path / "state"
    shutil.copytree(state() / "common", own / "adapter")
    shutil.copytree(exported("onnx"), own / "exports" / "mine")
    assert choose(Wish(own)).backend == "onnx"
    base = describe_model("base-tiny")
    keep_adapter(random_adapter(base.modules, 4, seed=9), own / "adapter", base)
    later = choose(Wish(own))
    assert (later.backend, later.adapter) == ("torch", own / "adapter")
    assert "edge-client export --format onnx-int8 --adapter global" in later.why
    with pytest.raises(ConfigError, match="holds no ONNX export"):
        choose(Wish(own, backend="onnx"))
    with pytest.raises(ConfigError, match="another adapter"):
        choose(Wish(own, own / "exports" / "mine", GLOBAL))
