"""Tie child processes to their parent, so that none outlives it, however the parent ends.

Each child's stdin is the reading end of a pipe that nobody writes to and whose other end the parent
alone holds. The kernel closes that end with the parent, even after `kill -9`: the child reads the
end of the file, ends as after SIGTERM, and is killed where it does not.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import cache

TIED = "TUNEFLEET_LIFELINE"
"""Set in the environment of a child whose stdin is its parent's lifeline."""
GRACE_S = 10.0
STDIN = 0


@cache
def lifeline() -> int:
    """Return what to start a child with as its `stdin`, beside `tied_environment`.

    The writing end stays open, in this process alone, until it ends.
    """
    reading, _ = os.pipe()
    return reading


def tied_environment(**more: str) -> dict[str, str]:
    """Return the environment to start a child in that is to end with this process."""
    return {**os.environ, TIED: "stdin", **more}


def end_with_parent() -> None:
    """Watch the lifeline from now on, if this process was started with one."""
    if os.environ.pop(TIED, None) is not None:  # popped: the stdin of a grandchild is another
        threading.Thread(target=_watch, name="lifeline", daemon=True).start()


def _watch() -> None:
    os.read(STDIN, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
