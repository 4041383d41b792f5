"""The agent's side of the training process: start it, ask it, and say so when it died."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from math import inf
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from edge_client.errors import WorkerError, WorkerKilled
from edge_client.trainer.pipe import receive, send
from edge_client.trainer.watchdog import Watchdog
from edge_client.trainer.worker import OUT_OF_MEMORY, serve
from protocol.notify import alive

_ending = False
"""Whether this process is to end, and its training with it."""
ENDED = "training was ended: its agent stops"
READING = ("open", "calibrate", "choose_threads")
"""Requests in which the base is read from its file."""


class TrainingProcess:
    """Run a `Worker` in a fresh process (spawned: it shares no memory with the agent).

    It is ended at `limit_mib` of resident memory.
    """

    def __init__(self, limit_mib: float = inf) -> None:
        if _ending:
            raise WorkerError(ENDED)
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=serve, args=(theirs,), name="training", daemon=True
        )
        start_child(self._process)
        theirs.close()
        assert self._process.pid is not None, "it was started"
        self._limit_mib = limit_mib
        self._watchdog = Watchdog(self._process.pid, limit_mib) if limit_mib < inf else None

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def call(
        self, name: str, *, on_progress: Callable[[Any], bool] | None = None, **arguments: Any
    ) -> Any:
        """Have the worker do something and return its answer.

        `on_progress` hears how far a training is after each step, and says whether it is to pause.

        Raises:
            WorkerKilled: the process was killed, for its memory most likely.
            WorkerError: the process died or failed.
            EdgeError: what the worker itself found wrong, as it said it.
        """
        if self._watchdog is not None:
            self._watchdog.reading = name in READING
        try:
            send(self._connection, (name, arguments))
            while True:
                reply = receive(self._connection)
                alive()
                if not reply.progress:
                    break
                pausing = False
                if on_progress is not None and reply.value is not None:
                    pausing = on_progress(reply.value)
                send(self._connection, pausing)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            raise self._how_it_ended() from None
        if reply.error is not None:
            raise reply.error
        if reply.crash == OUT_OF_MEMORY:
            raise WorkerKilled(f"the training process got no more memory in {name}")
        if reply.crash:
            raise WorkerError(f"the training process failed in {name}: {reply.crash}")
        return reply.value

    def stop(self) -> None:
        """End the process; what it holds is lost."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _how_it_ended(self) -> WorkerError:
        if _ending:
            return WorkerError(ENDED)
        code = self._process.exitcode
        if self._watchdog is not None and self._watchdog.killed_at_mib is not None:
            return WorkerKilled(
                f"the training process was ended at {self._watchdog.killed_at_mib:.0f} MiB: it may "
                f"take {self._limit_mib:.0f} MiB in all"
            )
        if code == -signal.SIGKILL:
            return WorkerKilled(
                "the training process was killed (signal 9), as the kernel does when memory runs "
                "out"
            )
        if code is not None and code < 0:
            return WorkerError(f"the training process ended by signal {-code}")
        return WorkerError(f"the training process ended with status {code}")


def start_child(process: BaseProcess) -> None:
    """Start a child that Ctrl-C, which a terminal sends to both, does not reach.

    That is the agent's to deal with. A child inherits which signals are blocked; the tracker, if it
    were started here, would undo that.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_training() -> None:
    """Kill the training processes of this one, and let none begin: it is about to end.

    A probe that ends so tells nothing of memory, nor does a round.
    """
    global _ending
    _ending = True
    for process in multiprocessing.active_children():
        process.kill()
