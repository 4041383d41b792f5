"""An artifact set on disk: what an export leaves and a device reads.

    train.onnx            the training graph
    weights.safetensors   the frozen base in float32, which the graph points into
    tokenizer.json        the tokenizer as transformers would use it
    manifest.json         what it is of, and a SHA-256 of each file

It has no rank: the factors are inputs, of whatever rank a device trains.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from edge_client.errors import ModelError

MANIFEST, GRAPH, WEIGHTS, TOKENIZER = (
    "manifest.json", "train.onnx", "weights.safetensors", "tokenizer.json",
)  # fmt: skip
FILES = (GRAPH, WEIGHTS, TOKENIZER)
_AGAIN = "make it with: edge-client export-onnx MODEL --out DIR, or copy it again"
TRAINED, FROZEN, FACTORS = "trained", "frozen", ("a", "b")


class Artifact(BaseModel):
    """Hold what the manifest of an artifact set says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str
    """The base model's name."""
    base_sha256: str
    """The base model's hash, as a job has it."""
    modules: dict[str, tuple[int, int]]
    """Target module → (d_out, d_in)."""
    head: str
    """Name of the output head's weight in the file of weights."""
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]
    """Names of special tokens, as chat templates use them, and the tokens."""
    opset: int
    versions: dict[str, str]
    """Libraries that made it."""
    files: dict[str, str]
    """File → SHA-256."""


def factor_name(part: str, module: str, factor: str) -> str:
    """Return the name of a graph's input: a factor of what is TRAINED or FROZEN in a module."""
    return f"{part}/{module}/{factor}"


def gradient_name(factor: str) -> str:
    """Return the name of a graph's output: the gradient of a factor."""
    return f"{factor}_grad"


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest of an artifact set.

    Raises:
        ModelError: it is not there, or is no manifest.
    """
    path = folder / MANIFEST
    try:
        return Artifact.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}; {_AGAIN}") from None
    except ValidationError as error:
        why = error.errors()[0]
        where = ".".join(str(part) for part in why["loc"])
        raise ModelError(f"{path} is no manifest ({where}: {why['msg']}); {_AGAIN}") from None


def check_artifact(folder: Path) -> Artifact:
    """Read the manifest of an artifact set, and check that its files are what it says.

    Raises:
        ModelError: a file is missing, or is another.
    """
    artifact = read_artifact(folder)
    for name in FILES:
        file = folder / name
        try:
            found = file_hash(file)
        except OSError as error:
            raise ModelError(f"can't read {file}: {error.strerror}; {_AGAIN}") from None
        if found != artifact.files.get(name):
            raise ModelError(f"{file} is not what {MANIFEST} says (its hash differs); {_AGAIN}")
    return artifact


def file_hash(path: Path) -> str:
    """Return a file's SHA-256, read in pieces.

    Raises:
        OSError: it can't be read.
    """
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def weight_entries(path: Path) -> dict[str, tuple[dict[str, Any], int, int]]:
    """Return the tensors of a safetensors file: name → header entry, offset and length in bytes."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (entry, 8 + size + entry["data_offsets"][0], end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def map_weight(path: Path, name: str) -> NDArray[np.float32]:
    """Map one float32 tensor of a file of weights: it takes the memory that is touched."""
    entry, offset, _ = weight_entries(path)[name]
    return np.memmap(path, np.float32, "r", offset, tuple(entry["shape"]))
