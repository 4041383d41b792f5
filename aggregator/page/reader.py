"""The one thread that reads snapshots for the page, its API and `/metrics`.

A view belongs to one thread at a time, and many are asked at once: they wait in a queue here, so
that however many look at the page, the aggregator shares its computer with one reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from aggregator.view import FleetReader

T = TypeVar("T")


class Reader:
    """Ask the views of all jobs below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fleet = FleetReader(root)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="page-reader")

    async def ask(self, question: Callable[[FleetReader], T]) -> T:
        """Return what a function says of the fleet, from the reader's thread.

        Raises what the function does.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, question, self._fleet)

    def ask_now(self, question: Callable[[FleetReader], T]) -> T:
        """Return it to a caller that is no coroutine, which waits."""
        return self._thread.submit(question, self._fleet).result()

    def close(self) -> None:
        """End the thread, and close what it has read."""
        self._thread.submit(self._fleet.close).result()
        self._thread.shutdown()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()
