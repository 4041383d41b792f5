"""A base model's way from a hub to this device, in a process of its own that can end at any time.

What has come stays in the hub's cache: a download that is begun again goes on from there.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from edge_client.errors import ModelError
from edge_client.model import PARTIAL, find_model
from edge_client.storage import keeping
from edge_client.trainer.process import start_child
from edge_client.trainer.worker import end_with_agent
from protocol.events import EventLog

STALLED_S = 600.0
"""A download of which nothing comes for so long is ended, and begun again."""


class ModelDownload:
    """Download the model of a hub's id; `used` hears of each part of it how many bytes it has."""

    def __init__(
        self, name: str, state: Path, events: EventLog, used: Callable[[int], None]
    ) -> None:
        self.folder: Path | None = None
        """Where the model is, once it is whole."""
        self._name, self._state, self._events, self._used = name, state, events, used
        self._child: tuple[BaseProcess, Connection] | None = None
        self._bytes = 0
        self._moved = 0.0

    def go_on(self) -> None:
        """Begin, or look how far it is.

        Raises:
            ModelError: no hub gave the model; says why.
            StorageError: the state folder can't be written.
        """
        if self.folder is not None:
            return
        if self._child is None:
            self._begin()
            return
        process, connection = self._child
        # What it says last, it says before it ends.
        ended, said = not process.is_alive(), connection.poll()
        self._count()
        if said:
            answer = _receive(connection)
            self.stop()
            if isinstance(answer, ModelError):
                raise answer
            self.folder = answer
            if answer is not None:
                (self._state / PARTIAL).unlink(missing_ok=True)
        elif ended or time.monotonic() - self._moved > STALLED_S:
            self.stop()  # killed, or it hangs: the next call begins again

    def stop(self) -> None:
        """End it where it is."""
        if self._child is None:
            return
        (process, connection), self._child = self._child, None
        process.kill()
        process.join()
        connection.close()
        self._count()

    def _begin(self) -> None:
        self._events.emit("state", state="downloading", detail=f"the model {self._name}")
        with keeping(PARTIAL, self._state):
            (self._state / PARTIAL).write_text(self._name)
        self._bytes, self._moved = _bytes_here(self._name), time.monotonic()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_download, args=(self._name, theirs), name="download", daemon=True
        )
        start_child(process)
        theirs.close()
        self._child = process, ours

    def _count(self) -> None:
        """Note what has come since the last look."""
        before, self._bytes = self._bytes, _bytes_here(self._name)
        if self._bytes > before:
            self._moved = time.monotonic()
            self._used(self._bytes - before)


def _receive(connection: Connection) -> Path | ModelError | None:
    """Return what the child said; None: it was killed before it said all."""
    try:
        answer: Path | ModelError = connection.recv()
    except (EOFError, OSError):
        return None
    return answer


def _bytes_here(name: str) -> int:
    """Return how much of a model is in the hub's cache, whole files or not.

    The files are looked at, for how they come is the hub library's own affair. A file may have its
    full length from the beginning: what is not written takes no blocks.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    total = 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except OSError:  # it has just been given its name
            continue
        if path.is_file() and not path.is_symlink():
            total += min(found.st_size, getattr(found, "st_blocks", found.st_size) * 512)
    return total


def _download(name: str, connection: Connection) -> None:
    """Say where the model is, or what is wrong: the child's main."""
    threading.Thread(target=end_with_agent, name="agent", daemon=True).start()
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the agent says how it goes
    answer: Path | ModelError
    try:
        answer = find_model(name)
    except ModelError as error:
        answer = error
    connection.send(answer)
