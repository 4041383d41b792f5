"""An artifact set: what a device trains a base model from with ONNX Runtime, as files in a folder.

    train.onnx            the training graph
    weights.safetensors   the frozen base in float32, which the graph points into
    tokenizer.json        the tokenizer as transformers would use it
    manifest.json         what it is of, and a SHA-256 of each file

It has no rank: the factors are inputs, of whatever rank a device trains. The device that makes it,
the aggregator that publishes it and the device that fetches it read the same manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import TunefleetError

MANIFEST, GRAPH, WEIGHTS, TOKENIZER = (
    "manifest.json", "train.onnx", "weights.safetensors", "tokenizer.json",
)  # fmt: skip
FILES = (GRAPH, WEIGHTS, TOKENIZER)
ALL_FILES = (*FILES, MANIFEST)
"""In the order in which they travel: the manifest makes a set whole."""
AGAIN = "make it with: edge-client export-onnx MODEL --out DIR, or copy it again"

M = TypeVar("M", bound=BaseModel)


class BadArtifact(TunefleetError):
    """A folder is no artifact set, or is not whole; says which file, and what to do."""


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


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest of an artifact set.

    Raises:
        BadArtifact: it is not there, or is no manifest.
    """
    return read_manifest(folder / MANIFEST, Artifact, BadArtifact, AGAIN)


def check_artifact(folder: Path) -> Artifact:
    """Read the manifest of an artifact set, and check that its files are what it says.

    Raises:
        BadArtifact: a file is missing, or is another.
    """
    artifact = read_artifact(folder)
    check_files(folder / MANIFEST, FILES, artifact.files, BadArtifact, AGAIN)
    return artifact


def read_manifest(path: Path, kind: type[M], wrong: type[TunefleetError], advice: str) -> M:
    """Read a manifest of a kind; what is wrong with it is said as `wrong`, with an advice.

    Raises:
        TunefleetError: it is not there, or is no such manifest.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise wrong(f"can't read {path}: {error.strerror}; {advice}") from None
    except ValidationError as error:
        why = error.errors()[0]
        where = ".".join(str(part) for part in why["loc"])
        raise wrong(f"{path} is no manifest ({where}: {why['msg']}); {advice}") from None


def check_files(
    manifest: Path,
    names: Iterable[str],
    hashes: Mapping[str, str],
    wrong: type[TunefleetError],
    advice: str,
) -> None:
    """Check that files beside a manifest are what it says.

    Raises:
        TunefleetError: a file is missing, or is another.
    """
    for name in names:
        file = manifest.parent / name
        try:
            found = sha256_of(file)
        except OSError as error:
            raise wrong(f"can't read {file}: {error.strerror}; {advice}") from None
        if found != hashes.get(name):
            raise wrong(f"{file} is not what {manifest.name} says (its hash differs); {advice}")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, read in pieces.

    Raises:
        OSError: it can't be read.
    """
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def artifact_id(manifest: bytes) -> str:
    """Return the name of an artifact set: 32 hex digits of the SHA-256 of its manifest.json.

    That has the hashes of all other files, so the name stands for every byte of the set.
    """
    return hashlib.sha256(manifest).hexdigest()[:32]
