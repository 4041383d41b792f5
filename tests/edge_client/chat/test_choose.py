"""What is missing is told so that it can be done where it is told; what can't be meant is refused.

No model is opened here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shlex import split

import pytest
from typer.testing import CliRunner

from edge_client.chat.choose import Wish, choose
from edge_client.cli import app
from edge_client.errors import ConfigError
from edge_client.storage import BASE
from protocol.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

pytest.importorskip("onnxruntime")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a Python without torch: its import fails, and it is not found."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return the state folder of a device with a shared adapter of base-tiny."""
    folder = tmp_path / "state" / "adapter"
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text("{}")
    (folder / ADAPTER_WEIGHTS).write_bytes(b"weights")
    (folder / BASE).write_text(json.dumps({"name": "base-tiny", "sha256": "ab"}))
    return folder.parent


def refused(wish: Wish) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(wish)
    return str(caught.value)


@pytest.mark.usefixtures("no_torch")
def test_without_torch_an_export_is_made_elsewhere_and_copied_here(state: Path) -> None:
    said = refused(Wish(state))
    assert (
        f"it is made on a computer with PyTorch, from a copy of this state folder ({state}): "
        "edge-client export --format onnx-int8 --adapter global --state COPY; "
        f"then copy what it makes to {state}/exports; answering with torch needs torch" in said
    )


def test_with_torch_the_command_is_for_here(state: Path) -> None:
    pytest.importorskip("torch")
    said = refused(Wish(state, backend="onnx"))
    command = f"edge-client export --format onnx-int8 --adapter global --state {state}"
    assert said.endswith(f"make it with: {command}")
    other = state / "adapter"  # an adapter that a folder names, and a base that the owner does
    said = refused(Wish(state, None, str(other), "onnx", "base-tiny"))
    assert split(said)[-6:] == [
        "--adapter",
        str(other),
        "--state",
        str(state),
        "--model",
        "base-tiny",
    ]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_where_there_is_no_adapter_yet_the_command_names_a_model(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if where == "elsewhere":
        request.getfixturevalue("no_torch")
    said = refused(Wish(tmp_path, backend="onnx"))
    assert "--adapter none --state " in said
    assert " --model MODEL (MODEL: base-tiny, a model folder, or a hub id)" in said
    assert (" --state COPY " in said) == (where == "elsewhere")


def test_a_folder_has_its_base_and_no_other(tmp_path: Path) -> None:
    said = refused(Wish(tmp_path, tmp_path / "export", model="base-tiny"))
    assert said == "--model goes without a folder: an export has its base in it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json"], "--json goes with --bench: an answer is text"),
        (["--temperature", "nan"], "--temperature nan is not a number from 0 to 100"),
        (["--temperature", "-1"], "--temperature -1 is not a number from 0 to 100"),
        (["--top-p", "nan"], "--top-p nan is not a number from 0 to 1"),
        (["--top-p", "1.5"], "--top-p 1.5 is not a number from 0 to 1"),
    ],
)
def test_options_that_can_mean_nothing_are_refused(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["chat", *arguments, "--prompt", "a"])
    assert isinstance(found.exception, ConfigError)
    assert str(found.exception) == said
