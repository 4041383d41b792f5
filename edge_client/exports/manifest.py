"""What an export says of itself: base, adapter, how its text is written, a hash of each file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_client.errors import ModelError
from protocol.artifact import TOKENIZER, sha256_of

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
    path = folder / MANIFEST
    try:
        return Export.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"can't read {path}: {error.strerror}; give a folder that edge-client export wrote"
        ) from None
    except ValidationError as error:
        why = error.errors()[0]
        where = ".".join(str(part) for part in why["loc"])
        raise ModelError(f"{path} is no manifest ({where}: {why['msg']}); {AGAIN}") from None


def check_export(folder: Path) -> Export:
    """Read the manifest of an export, and check that its files are what it says.

    Raises:
        ModelError: a file is missing, or is another.
    """
    export = read_export(folder)
    needed = {GRAPH, TOKENIZER} if export.is_onnx else set()
    for name in sorted(needed | set(export.files)):
        file = folder / name
        try:
            found = sha256_of(file)
        except OSError as error:
            raise ModelError(f"can't read {file}: {error.strerror}; {AGAIN}") from None
        if found != export.files.get(name):
            raise ModelError(f"{file} is not what {MANIFEST} says (its hash differs); {AGAIN}")
    return export


def kept_exports(state: Path) -> Iterator[tuple[Path, Export]]:
    """Yield the exports in a state folder that have a manifest, by name."""
    for manifest in sorted((state / FOLDER).glob(f"*/{MANIFEST}")):
        with suppress(ModelError):
            yield manifest.parent, read_export(manifest.parent)
