"""Say what is waited for, where it takes long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def saying(what: str, *, after_s: float) -> Iterator[None]:
    """Say on stderr what the block waits for, if it takes longer than `after_s`."""
    timer = threading.Timer(after_s, lambda: print(f"{what} …", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
