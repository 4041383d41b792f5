"""A training that can stop between two steps and go on as if it never had: kept on disk whole.

What is kept: the factors that are trained, the optimiser's state, losses so far, where in the text
it stands, and the state of the random numbers. A file is of one training alone, by its identity:
that of another job, round, attempt, plan, text or adapter is taken away. So is one that is not what
was written, by its hash; and what is not finite is never written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import DataError, TrainingDiverged, TrainingPaused
from edge_client.plan import Plan
from protocol.adapter import Adapter
from protocol.errors import os_words

if TYPE_CHECKING:
    from edge_client.data.pack import BatchStream, PackedRow, StreamState
    from edge_client.trainer.base import Resumable

FILE = "training.safetensors"
_TEMPORARY = FILE + ".tmp"
_SIZES = ("rank", "held", "seq_len", "blocks", "optimizer")
"""Of a plan, what is trained; how it is computed a start with other memory free may choose anew."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where a training is kept, whose it is, and how often it is written."""

    path: Path
    identity: str
    every_s: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file says of a training, beside its tensors."""

    identity: str
    losses: list[float]
    """Of the steps that are done, nats a token."""
    tokens: int
    stream: StreamState
    loss_before: float | None
    """On a sample of the text, if that was asked for."""


@dataclass(frozen=True, slots=True)
class NotKept:
    """Told on the way: a training goes on, but a kill would lose it."""

    why: str


def identity_of(
    plan: Plan, trained: Adapter, frozen: Adapter | None, what: Mapping[str, object]
) -> str:
    """Return a hash of all that a training's outcome follows from, but for the text.

    `what` is the rest of it: job, round, steps and so on, as JSON has it.
    """
    sizes = {name: getattr(plan, name) for name in _SIZES}
    found = hashlib.sha256(json.dumps([sizes, what], sort_keys=True).encode())
    for adapter in (trained, frozen or Adapter({}, 1.0)):
        for name in sorted(adapter.layers):
            factors = adapter.layers[name]
            for factor in (factors.a, factors.b):
                found.update(f"{name} {factor.shape}".encode())
                found.update(np.ascontiguousarray(factor, np.float32).data)
    return found.hexdigest()


def read_kept(
    keeping: Keeping, rows: Sequence[PackedRow], micro_batch: int
) -> tuple[Kept | None, BatchStream | None]:
    """Return what is kept of this training, and the text from where it stands; or nothing.

    A file of another training, of another text, or a damaged one, is taken away.
    """
    from safetensors import SafetensorError, safe_open

    from edge_client.data import BatchStream

    try:
        with safe_open(keeping.path, framework="np") as file:
            metadata = file.metadata()
            kept = Kept(**json.loads(metadata["training"]))
            mine = kept.identity == keeping.identity
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            whole = mine and _hash(metadata["training"], tensors) == metadata["sha256"]
        if whole:
            return kept, BatchStream.from_state(rows, micro_batch, kept.stream)
    except FileNotFoundError:
        return None, None
    except (SafetensorError, DataError, OSError, KeyError, TypeError, ValueError):
        pass
    forget(keeping.path.parent)
    return None, None


def forget(folder: Path) -> None:
    """Take away what is kept in a state folder: that training is over."""
    for name in (FILE, _TEMPORARY):
        (folder / name).unlink(missing_ok=True)


class Checkpoints:
    """Stand between the steps of one training: begin where it was left, keep it, pause it.

    `kept` is what `read_kept` has found; `stream` says where the text stands; `pausing` whether to
    pause now. `tell` hears, once, that the training can't be kept.
    """

    def __init__(
        self,
        keeping: Keeping,
        kept: Kept | None,
        stream: Callable[[], StreamState],
        pausing: Callable[[], bool],
        loss_before: float | None,
        tell: Callable[[NotKept], object],
    ) -> None:
        self._keeping, self._kept = keeping, kept
        self._stream, self._pausing, self._loss_before = stream, pausing, loss_before
        self._tell, self._told = tell, False
        self._written = time.monotonic()

    def begin(self, state: Resumable) -> tuple[list[float], int]:
        """Put factors and the optimiser's state back; return the losses so far, and tokens."""
        if self._kept is None:
            return [], 0
        from safetensors.numpy import load_file

        if not state.restore(load_file(self._keeping.path)):
            forget(self._keeping.path.parent)  # of another release or backend
            return [], 0
        return list(self._kept.losses), self._kept.tokens

    def after_step(self, state: Resumable, losses: list[float], tokens: int) -> None:
        """Keep the training if it is time, or if it pauses.

        Raises:
            TrainingPaused: it goes on from here when it is asked for again.
            TrainingDiverged: there is nothing to keep.
        """
        pausing = self._pausing()
        unkept = ""
        if pausing or time.monotonic() - self._written >= self._keeping.every_s:
            unkept = self._keep(state, losses, tokens)
        if pausing:
            raise TrainingPaused(len(losses), unkept)
        if unkept and not self._told:
            self._told = True
            self._tell(NotKept(unkept))

    def _keep(self, state: Resumable, losses: list[float], tokens: int) -> str:
        """Write, and return why that can't be done: a full disk must not end a training."""
        from safetensors import SafetensorError

        self._written = time.monotonic()
        try:
            self._write(state, losses, tokens)
        except (OSError, SafetensorError) as error:
            return os_words(error)
        return ""

    def _write(self, state: Resumable, losses: list[float], tokens: int) -> None:
        from safetensors.numpy import save_file

        keeping = self._keeping
        about = Kept(keeping.identity, losses, tokens, self._stream(), self._loss_before)
        temporary = keeping.path.with_name(_TEMPORARY)
        arrays = state.arrays()
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise TrainingDiverged(f"training diverged in step {len(losses)}")
        training = json.dumps(asdict(about))
        metadata = {"training": training, "sha256": _hash(training, arrays.items())}
        save_file(arrays, temporary, metadata=metadata)
        _sync(temporary)
        os.replace(temporary, keeping.path)
        _sync(keeping.path.parent)


def _hash(training: str, tensors: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """Return a hash of all that a file says: tensors, in any order, and what is beside them."""
    each = {}
    for name, tensor in tensors:
        content = hashlib.sha256(np.ascontiguousarray(tensor).data).hexdigest()
        each[name] = [str(tensor.dtype), list(tensor.shape), content]
    return hashlib.sha256(json.dumps([training, each], sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
