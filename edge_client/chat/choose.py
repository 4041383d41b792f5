"""What answers: which adapter, from which export or base, on which backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Literal

from edge_client.backends import missing_torch
from edge_client.errors import ConfigError, EdgeError
from edge_client.exports.manifest import FOLDER, Export, check_export, kept_exports
from edge_client.kept import NAMES, NONE, Kept, best_adapter, find_adapter, find_base
from edge_client.model import find_model, model_hash
from protocol.extras import how_to_install

Backend = Literal["torch", "onnx"]
BASES = "base-tiny, a model folder, or a hub id"
ONNX_PACKAGES = ("onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class Choice:
    """Say what to open."""

    backend: Backend
    folder: Path
    """An export, or the base model."""
    adapter: Path | None
    """A PEFT folder to be merged in; None: the folder is to be taken as it is."""
    export: Export | None
    """What the folder's manifest says, if it is an export."""
    words: str
    """What answers, for people."""
    why: str = ""
    """Why it is not the other backend; empty: nobody wanted that, or it comes second anyhow."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Hold what the owner asked for; empty: not said."""

    state: Path
    folder: Path | None = None
    adapter: str = ""
    backend: Literal["auto", "torch", "onnx"] = "auto"
    model: str = ""


def choose(wish: Wish) -> Choice:
    """Return what answers: the export that is named, else one that fits the adapter, else torch.

    Raises:
        ConfigError: it can't be done so; says what is missing, and what to do.
        ModelError: a model, adapter or export is damaged, or of another base.
    """
    if wish.folder is not None:
        if wish.model:
            raise ConfigError("--model goes without a folder: an export has its base in it")
        return _named(wish, wish.folder)
    kept = find_adapter(wish.adapter, wish.state) if wish.adapter else best_adapter(wish.state)
    ways: dict[Backend, Callable[[Wish, Kept], Choice]] = {"onnx": _by_onnx, "torch": _by_torch}
    refused: list[str] = []
    for backend, way in ways.items():
        if wish.backend in ("auto", backend):
            try:
                found = way(wish, kept)
            except _CannotError as error:
                refused.append(str(error))
                continue
            return replace(found, why="; ".join(refused))
    raise ConfigError("; ".join(refused))


class _CannotError(EdgeError):
    """This backend can't be used; another may."""


def _named(wish: Wish, folder: Path) -> Choice:
    """Return how the export in a folder answers, if that is what the owner wants."""
    export = check_export(folder)
    if wish.adapter:
        _check_adapter(wish, folder, export)
    backend: Backend = "onnx" if export.is_onnx else "torch"
    if wish.backend not in ("auto", backend):
        raise ConfigError(
            f"the export in {folder} is {export.kind}, which answers with --backend {backend}"
        )
    if why := _missing(backend):
        raise ConfigError(why)
    return Choice(backend, folder, None, export, _words(export.base, export.adapter))


def _check_adapter(wish: Wish, folder: Path, export: Export) -> None:
    """Refuse an export of another adapter than the owner wants, or of an earlier one."""
    here: Kept | None = None
    if wish.adapter not in (NONE, export.adapter) or wish.adapter not in NAMES:
        here = find_adapter(wish.adapter, wish.state)
    elif wish.adapter != NONE:
        try:
            here = find_adapter(wish.adapter, wish.state)
        except ConfigError:
            return  # it was made on another computer
    elif export.adapter == NONE:
        return
    if here is None or here.sha256 != export.adapter_sha256:
        raise ConfigError(
            f"the export in {folder} has another adapter ({export.adapter}) than the "
            f"{wish.adapter} one of this device now; {_advice(wish, here, export.kind, folder)}"
        )


def _by_onnx(wish: Wish, kept: Kept) -> Choice:
    """Return the export in the state folder that has this adapter, the smaller of two."""
    if why := _missing("onnx"):
        raise _CannotError(why)
    base = kept.base_sha256 if kept.folder else ""
    if wish.model:
        base = model_hash(find_model(wish.model))
    fits = [
        (folder, export)
        for folder, export in kept_exports(wish.state)
        if export.is_onnx
        and export.adapter_sha256 == kept.sha256
        and base in ("", export.base_sha256)
    ]
    if not fits:
        raise _CannotError(
            f"{wish.state / FOLDER} holds no ONNX export of {_words('the base', kept.name)}; "
            f"{_advice(wish, kept, 'onnx-int8')}"
        )
    folder, export = max(fits, key=lambda pair: pair[1].kind == "onnx-int8")
    check_export(folder)
    return Choice("onnx", folder, None, export, _words(export.base, export.adapter))


def _by_torch(wish: Wish, kept: Kept) -> Choice:
    if why := _missing("torch"):
        raise _CannotError(why)
    base = find_base(kept, wish.model)
    return Choice("torch", base, kept.folder, None, _words(kept.base or base.name, kept.name))


def _missing(backend: Backend) -> str:
    """Return why this Python can't answer with a backend; empty: it can."""
    if backend == "torch":
        return missing_torch("answering")
    missing = [name for name in ONNX_PACKAGES if not find_spec(name)]
    if not missing:
        return ""
    return f"answering with ONNX Runtime needs {', '.join(missing)}; {how_to_install('chat')}"


def _words(base: str, adapter: str) -> str:
    return f"{base} without an adapter" if adapter == NONE else f"{base} with adapter {adapter!r}"


def _advice(wish: Wish, kept: Kept | None, kind: str, out: Path | None = None) -> str:
    """Say how an export is made, also where it can't be: on a device without torch."""
    place = wish.state / FOLDER if out is None else out
    if not missing_torch():
        return f"make it with: {_command(wish, kept, kind, str(wish.state), out)}"
    more = f" and of {wish.adapter}" if wish.adapter not in ("", *NAMES) else ""
    return (
        f"it is made on a computer with PyTorch, from a copy of this state folder ({wish.state})"
        f"{more}: "
        f"{_command(wish, kept, kind, 'COPY')}; then copy what it makes to {place}"
    )


def _command(wish: Wish, kept: Kept | None, kind: str, state: str, out: Path | None = None) -> str:
    """Return the command that makes an export; MODEL is what nobody said yet."""
    parts = ["edge-client", "export", *([str(out)] if out else []), "--format", kind]
    parts += ["--adapter", wish.adapter or (kept.name if kept else NONE), "--state", state]
    if wish.model or not (kept and kept.base):
        parts += ["--model", wish.model or "MODEL"]
    said = " ".join(quote(part) for part in parts)
    return f"{said} (MODEL: {BASES})" if "MODEL" in parts else said
