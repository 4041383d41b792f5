"""The adapters that a device holds: which of them a name means, and of which base it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.errors import ConfigError, ModelError
from edge_client.model import find_model, model_hash
from edge_client.storage import BASE
from protocol.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

NONE, GLOBAL, PERSONAL, MIXED = "none", "global", "personal", "mixed"
NAMES = (NONE, GLOBAL, PERSONAL, MIXED)
_WORDS = {
    GLOBAL: "shared adapter",
    PERSONAL: "adapter of its own",
    MIXED: "mixture of a private and the shared adapter",
}


@dataclass(frozen=True, slots=True)
class Kept:
    """Hold where an adapter is, and what it is of."""

    name: str
    """One of NAMES, or the name of its folder."""
    folder: Path | None
    """A PEFT folder; None: the base alone."""
    base: str
    """What its base model is called; empty: nobody said."""
    base_sha256: str
    """The base's hash; empty: nobody said."""
    sha256: str
    """Of the adapter's files; empty for the base alone."""


def find_adapter(name: str, state: Path) -> Kept:
    """Return the adapter that a name means: one of NAMES, of the device with `state`, or a folder.

    `global` is what the fleet shares. `personal` is what is best for this device alone: the mixture
    with a private adapter, or its own of a job with personal adapters.

    Raises:
        ConfigError: the device has none of this name.
        ModelError: the folder holds no adapter.
    """
    if name == NONE:
        known = next((read_adapter(NONE, f) for f in _folders(state) if _is_there(f)), None)
        base, base_sha256 = (known.base, known.base_sha256) if known else ("", "")
        return Kept(NONE, None, base, base_sha256, "")
    if name not in NAMES:
        folder = Path(name).expanduser()
        return read_adapter(folder.resolve().name, folder)
    found = next((folder for folder in _places(name, state) if _is_there(folder)), None)
    if found is None:
        raise ConfigError(
            f"this device has no {_WORDS[name]}: there is none in {state}; take part in a job that "
            "leaves one (edge-client run), say which device with --name or --state, or choose "
            f"another --adapter: {', '.join(NAMES)}, or a PEFT folder"
        )
    return read_adapter(name, found)


def best_adapter(state: Path) -> Kept:
    """Return what a device would rather use: its own adapter, else the shared one, else none."""
    for name in (PERSONAL, GLOBAL):
        if any(_is_there(folder) for folder in _places(name, state)):
            return find_adapter(name, state)
    return find_adapter(NONE, state)


def find_base(kept: Kept, model: str) -> Path:
    """Return the folder of an adapter's base model; `model`, if given, says where it is.

    Raises:
        ConfigError: nobody said which base.
        ModelError: it is not there, or is another than the adapter was trained on.
    """
    if not (model or kept.base):
        raise ConfigError("say which base model with --model: there is no adapter that names one")
    folder = find_model(model or kept.base)
    if kept.folder and kept.base_sha256 and model_hash(folder) != kept.base_sha256:
        raise ModelError(
            f"the model in {folder} is not the base {kept.base!r} of the adapter in {kept.folder} "
            f"(whose hash is {kept.base_sha256[:12]}…); give the right one with --model"
        )
    return folder


def read_adapter(name: str, folder: Path) -> Kept:
    """Read of which base the adapter in a PEFT folder is.

    Raises:
        ModelError: the folder holds no adapter, or a damaged one.
    """
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    said = _read_json(config)
    try:
        digest = hashlib.sha256(config.read_bytes() + weights.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(
            f"can't read {weights}: {error.strerror}: it is no whole adapter"
        ) from None
    base = _read_json(folder / BASE) if (folder / BASE).is_file() else {}
    named = base.get("name") or said.get("base_model_name_or_path") or ""
    return Kept(name, folder, str(named), str(base.get("sha256", "")), digest)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"can't read {path}: {error.strerror}; give the folder of a PEFT adapter"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged: it is not JSON of an adapter; make or copy it again")
    return found


def _is_there(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _folders(state: Path) -> list[Path]:
    return [state / name for name in ("adapter", "common", "mixed")]


def _places(name: str, state: Path) -> list[Path]:
    """Return the folders in which an adapter of this name may be, in the order of preference."""
    own, common, mixed = _folders(state)
    has_own = _is_there(common)  # which lies beside it only then
    if name == GLOBAL:
        return [common] if has_own else [own]
    return [mixed, *([own] if name == PERSONAL and has_own else [])]
