"""Files that outlive the process: written whole or not at all, and PEFT's own format."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from protocol.adapter import Adapter
from protocol.errors import StateError
from protocol.faults import fault_point
from protocol.tensors import encode

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names of the files of an adapter."""
LOCK = "lock"
"""File of a state folder that its process has locked, and has written its number to."""
PRIVATE = 0o600
"""Mode of a file that its owner alone may read."""
PRIVATE_UMASK = 0o077


def user_folder() -> Path:
    """Return where this user's data is kept: in XDG_DATA_HOME, else ~/.local/share."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "tunefleet"


def write_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that after a power cut it is there whole or not at all.

    Temporary file, fsync, rename, fsync of the folder. `mode` is further limited by the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # one left by a crash may have another mode
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        fault_point("file.written")
        os.fsync(file.fileno())
    fault_point("file.synced")
    os.replace(temporary, path)
    fault_point("file.renamed")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def lock_folder(
    folder: Path, who: str, *, instead: str = "name another folder with --state"
) -> Iterator[None]:
    """Keep a state folder to this process and its user; the lock ends with it, however it ends.

    Where another has it, `instead` is what may be done but ending that.

    What the process writes inside the block, its owner alone may read, in a folder too that was
    there before and is open to others: whole updates are among it.

    Raises:
        StateError: another process has it, or it can't be written to.
    """
    umask = os.umask(PRIVATE_UMASK)
    try:
        with _locked(folder, who, instead):
            yield
    finally:
        os.umask(umask)


@contextmanager
def _locked(folder: Path, who: str, instead: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise StateError(
            f"can't keep the {who}'s state in {folder}: {error.strerror}; name a folder that can "
            "be written to with --state"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(
                f"another {who} is running with its state in {folder}; end it, or {instead}"
            ) from None
        _sign(file)
        yield


def _sign(lock: TextIO) -> None:
    """Write down which process has a lock, for who asks without taking it."""
    from protocol.lifetime import began

    pid = os.getpid()
    with suppress(OSError):  # a full disk: it holds all the same
        lock.truncate(0)
        # Past the file's buffer, which would be tried again, and fail, when it is closed.
        os.write(lock.fileno(), json.dumps({"pid": pid, "began": began(pid)}).encode())


def folder_holder(folder: Path) -> int | None:
    """Return the process that has a state folder now; None if nobody does."""
    from protocol.lifetime import is_alive

    try:
        told = json.loads((folder / LOCK).read_text())
        pid, begun = told["pid"], told["began"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return pid if is_alive(pid, begun) else None


def write_peft(adapter: Adapter, folder: Path, *, base_model: str) -> None:
    """Write an adapter as the directory that `PeftModel.from_pretrained` loads.

    PEFT adds (alpha/r)·B·A, so each module's alpha is scale·rank; modules whose rank differs from
    the adapter's are named in `rank_pattern` and `alpha_pattern`.
    """
    layers = {name: f for name, f in adapter.layers.items() if f.rank}
    ranks = {name: f.rank for name, f in layers.items() if f.rank != adapter.rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": sorted(layers),
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {_exactly(name): adapter.scale * rank for name, rank in ranks.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    tensors = {_tensor_name(name, "A"): f.a for name, f in layers.items()}
    tensors |= {_tensor_name(name, "B"): f.b for name, f in layers.items()}
    write_durably(folder / ADAPTER_WEIGHTS, encode(tensors, "f32"))
    write_durably(folder / ADAPTER_CONFIG, json.dumps(config, indent=2).encode())


def _tensor_name(module: str, factor: str) -> str:
    """Return PEFT's name of a factor."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def _exactly(module: str) -> str:
    """Return the pattern that PEFT matches with this module alone, not with others ending so."""
    return "^" + module.replace(".", r"\.")
