"""JSON Lines: a line a round, for everything that reads text."""

from __future__ import annotations

import json
from pathlib import Path

from aggregator.tracking.base import Run, Values

FILE = "rounds.jsonl"


class LinesSink:
    """Append to a file; a line that a crash has cut short is taken off first."""

    def __init__(self, run: Run) -> None:
        path = run.folder / FILE
        self._last = mend(path)
        self._file = path.open("ab")
        self._job = run.job

    def log(self, step: int, values: Values) -> None:
        if step <= self._last:  # a crash came before it was noted that this is written
            return
        line = json.dumps({"job": self._job, "round": step, **values})
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def mend(path: Path) -> int:
    """Cut off what stands behind the last whole line of a file; return that line's round."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    lines = data[:whole].splitlines()
    return int(json.loads(lines[-1])["round"]) if lines else 0
