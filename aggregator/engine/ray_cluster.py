"""Work as Ray tasks: on the cluster that RAY_ADDRESS names, or on one of this machine's cores.

A task gets its piece as bytes and returns bytes, so that nothing of it stays in Ray's shared memory
once it is read. Tasks are pure, so Ray may do one again elsewhere when a machine of it is lost.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aggregator.engine import Name
from aggregator.errors import EngineError
from protocol.errors import TunefleetError
from protocol.extras import how_to_install

T = TypeVar("T")
R = TypeVar("R")
PATIENCE_S = 5.0
AHEAD = 2
"""Pieces that are under way for each core of the cluster: one at work, one on its way."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    # Of a cluster that is started here: between two rounds its processes keep what they have read.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""What Ray reads from the environment, unless that says otherwise."""


class RayEngine:
    """Work on a Ray cluster, one core a piece.

    Raises:
        EngineError: Ray is not installed, or its cluster can't be reached.
    """

    name: Name = "ray"

    def __init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise EngineError(f"engine ray needs an extra; {how_to_install('ray')}")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        _knock(os.environ.get("RAY_ADDRESS", ""))
        import ray

        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                with _own_signals():
                    ray.init(
                        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
                        log_to_driver=False,
                        logging_level=logging.WARNING,
                    )
            except Exception as error:  # Ray's own have no base: a slow start is a bare one
                raise EngineError(f"can't use Ray: {_one_line(error)}") from None
        resources: dict[str, float] = ray.cluster_resources()
        self.cores = max(1, int(resources.get("CPU", 1)))
        self._run = ray.remote(num_cpus=1)(run_pickled)
        known = os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address
        self.environment: Mapping[str, str] = {"RAY_ADDRESS": known}

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._own:
            self._ray.shutdown()

    def map(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        """Yield `work(piece)` for each piece, in their order.

        Raises:
            EngineError: the cluster is gone, or has not what the work needs.
            TunefleetError: the work itself has.
        """
        under_way: deque[Callable[[], R]] = deque()
        for piece in pieces:
            under_way.append(self.submit(work, piece))
            if len(under_way) >= AHEAD * self.cores:
                yield under_way.popleft()()
        while under_way:
            yield under_way.popleft()()

    def submit(self, work: Callable[[T], R], piece: T) -> Callable[[], R]:
        """Begin `work(piece)` as soon as a core is free; return what waits for its result."""
        return partial(self._result, self._run.remote(work, pickle.dumps(piece, protocol=5)))

    def _result(self, reference: Any) -> Any:
        try:
            result = pickle.loads(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"the Ray cluster can't do its part: {_one_line(error)}; each machine of it needs "
                "tunefleet, as it is here"
            ) from None
        if isinstance(result, TunefleetError):
            raise result
        return result


def run_pickled(work: Callable[[Any], Any], piece: bytes) -> bytes:
    """Do a piece of work; an error of ours is returned, not raised, so that it stays what it is."""
    try:
        result = work(pickle.loads(piece))
    except TunefleetError as error:
        result = error
    return pickle.dumps(result, protocol=5)


def _knock(address: str) -> None:
    """See that somebody listens where a cluster is said to be: Ray asks for minutes.

    Raises:
        EngineError: nobody does.
    """
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if place.hostname is None or place.port is None:
            return  # "auto" and the like: Ray knows what is meant
        socket.create_connection((place.hostname, place.port), PATIENCE_S).close()
    except (OSError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}; `ray start --head` on "
            "that machine starts one, and without RAY_ADDRESS this machine's cores are used"
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back how this process ends when it is told to, which Ray takes over."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _one_line(error: Exception) -> str:
    """Return the last line that an error has to say, which in Ray's is what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
