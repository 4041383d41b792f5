"""What an export says of itself: base, adapter, how its text is written, a hash of each file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from edge_client.errors import ModelError
from protocol.artifact import TOKENIZER, check_files, read_manifest

MANIFEST, GRAPH = "tunefleet.json", "model.onnx"
FOLDER = "exports"
"""In a state folder, where exports are unless the owner names another place."""
AGAIN = "make it again with edge-client export, or copy it again"
Kind = Literal["merged", "onnx", "onnx-int8"]


class Export(BaseModel):
    """Hold what the manifest of an export says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    base: str
    """The base model's name."""
    base_sha256: str
    adapter: str
    """The adapter that is merged in, by the name it was asked for; `none`: there is none."""
    adapter_sha256: str
    """As in `kept.Kept`."""
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]
    """Names of special tokens, as chat templates use them, and the tokens."""
    stop_tokens: tuple[int, ...]
    """Tokens that end an answer."""
    context_tokens: int | None
    """The longest text that the model takes; None: the model does not say."""
    versions: dict[str, str]
    """Libraries that made it."""
    files: dict[str, str]
    """File → SHA-256."""

    @property
    def is_onnx(self) -> bool:
        """Say whether it is for ONNX Runtime."""
        return self.kind != "merged"


def read_export(folder: Path) -> Export:
    """Read the manifest of an export.

    Raises:
        ModelError: it is not there, or is no manifest.
    """
    if not (folder / MANIFEST).exists():
        raise ModelError(f"{folder} has no {MANIFEST}; give a folder that edge-client export wrote")
    return read_manifest(folder / MANIFEST, Export, ModelError, AGAIN)


def check_export(folder: Path) -> Export:
    """Read the manifest of an export, and check that its files are what it says.

    Raises:
        ModelError: a file is missing, or is another.
    """
    export = read_export(folder)
    needed = {GRAPH, TOKENIZER} if export.is_onnx else set()
    names = sorted(needed | set(export.files))
    check_files(folder / MANIFEST, names, export.files, ModelError, AGAIN)
    return export


def kept_exports(state: Path) -> Iterator[tuple[Path, Export]]:
    """Yield the exports in a state folder that have a manifest, by name."""
    for manifest in sorted((state / FOLDER).glob(f"*/{MANIFEST}")):
        with suppress(ModelError):
            yield manifest.parent, read_export(manifest.parent)
