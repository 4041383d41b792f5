"""Several processes on one state folder: one at a time changes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.files import PRIVATE

FILE = "turn.lock"


class Turns:
    """Take turns by a lock on a file, which the kernel releases however a process ends.

    SQLite's own lock would do for rows. But files are renamed after a commit and removed because no
    row needs them, and a merge must not miss what is counted while it reads: all that is one turn.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._depth = 0

    @contextmanager
    def take(self, *, wait: bool = True) -> Iterator[bool]:
        """Keep the turn for the block, and yield whether it was had: always, after a wait for it.

        Inside another block it is a part of that.

        Raises:
            OSError: the file can't be made.
        """
        if self._depth:
            yield True
            return
        with open(os.open(self._path, os.O_RDWR | os.O_CREAT, PRIVATE), "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self._depth += 1
            try:
                yield True
            finally:
                self._depth -= 1
