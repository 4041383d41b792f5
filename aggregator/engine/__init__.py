"""Where pieces of work are worked out that need nothing of each other.

An engine maps a function over pieces, or does one of them until its result is asked for. The
function is a module's, so that another process finds it by its name, and a piece carries all that
it takes: `merge_module` of `aggregator.merge.rules` and its `ModuleTask` are such a pair. Which
engine it was can't be told from the results.

Read: this module, then `ray_cluster` (an existing Ray cluster, or one on this machine).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, Protocol, TypeVar

Name = Literal["plain", "ray"]
T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Work out pieces of work, in whichever order, somewhere."""

    @property
    def name(self) -> Name: ...
    @property
    def environment(self) -> Mapping[str, str]:
        """What has an engine of this name work there too, in a process that is started with it."""
        ...

    def map(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        """Yield `work(piece)` for each piece, in their order; few pieces are made ahead.

        Raises:
            EngineError: the engine can't do it, through no fault of the work.
        """
        ...

    def submit(self, work: Callable[[T], R], piece: T) -> Callable[[], R]:
        """Have `work(piece)` done by the time that the function returned is called, which gives it.

        That raises what the work does, and EngineError as `map`.
        """
        ...


class InProcess:
    """Work in this process, one piece after the other, when its result is asked for."""

    name: Name = "plain"
    environment: Mapping[str, str] = {}

    def map(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        return map(work, pieces)

    def submit(self, work: Callable[[T], R], piece: T) -> Callable[[], R]:
        return partial(work, piece)


IN_PROCESS = InProcess()


def open_engine(name: Name) -> AbstractContextManager[Engine]:
    """Return an engine by its name, to be used within the context.

    Raises:
        EngineError: it is not installed, or there is nothing that it could work on.
    """
    if name == "plain":
        return nullcontext(IN_PROCESS)
    from aggregator.engine.ray_cluster import RayEngine

    return RayEngine()
