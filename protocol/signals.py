"""Being asked to stop: SIGTERM and SIGINT, caught for as long as something runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[list[str]]:
    """Call `stop` on SIGTERM and SIGINT inside the block; restore their handlers after it.

    The block gets a list, in which the names of signals come as these do.
    """
    caught: list[str] = []

    def handle(number: int, _: object) -> None:
        caught.append(signal.Signals(number).name)
        stop()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
