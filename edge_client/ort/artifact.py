"""An artifact set on disk as a device reads it; `protocol.artifact` says what is in it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import ModelError
from protocol import artifact
from protocol.artifact import Artifact, BadArtifact

TRAINED, FROZEN, FACTORS = "trained", "frozen", ("a", "b")
CACHED_SETS = "onnx"
"""In the cache: folder of artifact sets that were fetched, each in one named by its id."""


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
    try:
        return artifact.read_artifact(folder)
    except BadArtifact as error:
        raise ModelError(str(error)) from None


def check_artifact(folder: Path) -> Artifact:
    """Read the manifest of an artifact set, and check that its files are what it says.

    Raises:
        ModelError: a file is missing, or is another.
    """
    try:
        return artifact.check_artifact(folder)
    except BadArtifact as error:
        raise ModelError(str(error)) from None


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
