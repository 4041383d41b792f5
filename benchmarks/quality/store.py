"""Results on disk, one file a run, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims import FOLDER
from benchmarks.quality.arms import ARMS, GRID, Result, Schedule
from edge_client.errors import DataError

RUNS = FOLDER / "quality"
PUBLISHED = "runs.json"
"""In docs/quality: results of runs by the names of their files, so that seeds can be added."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run: everything that its result depends on, but for the code."""

    dataset: str
    model: str
    arm: str
    seed: int
    rate: float
    schedule: Schedule

    @property
    def path(self) -> Path:
        """The file of its result."""
        arm_fields = asdict(ARMS[self.arm])
        for name in ("start", "searched"):
            arm_fields.pop(name)
        # Only what is set: a setting that arms get later, and do not use, changes no name.
        arm_fields = {name: _set(value) for name, value in arm_fields.items() if value}
        settled = {"arm": arm_fields, "schedule": asdict(self.schedule)}
        digest = hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:8]
        arm = re.sub(r"[^a-z0-9.]+", "-", self.arm)
        name = f"{self.dataset}.{self.model}.{arm}.s{self.seed}.r{self.rate:g}.{digest}.json"
        return RUNS / name

    def read(self) -> Result | None:
        """Return its result, if there is one."""
        try:
            return Result(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None

    def write(self, result: Result) -> None:
        """Keep its result."""
        RUNS.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(asdict(result)))
        part.replace(self.path)


def read_published(folder: Path) -> dict[str, Result]:
    """Return the results that a folder of the docs has, by the names of their files.

    Raises:
        DataError: it has none.
    """
    try:
        kept = json.loads((folder / PUBLISHED).read_text())
    except OSError as error:
        raise DataError(f"cannot read {folder / PUBLISHED}: {error.strerror}") from None
    return {name: Result(**fields) for name, fields in kept.items()}


def write_published(folder: Path, results: Mapping[str, Result]) -> None:
    """Write results beside those that the folder has, a line each."""
    before = read_published(folder) if (folder / PUBLISHED).exists() else {}
    known = {**before, **results}
    lines = (f"{json.dumps(name)}: {json.dumps(asdict(known[name]))}" for name in sorted(known))
    (folder / PUBLISHED).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _set(value: Any) -> Any:
    return {n: _set(v) for n, v in value.items() if v} if isinstance(value, dict) else value


def best_rate(loss: Callable[[float], float], start: float) -> float:
    """Climb the grid of learning rates from `start`, a step at a time, to where the loss is least.

    The loss is that of the trust splits, and taken to have one minimum over the grid.
    """
    at = GRID.index(start)
    for step in (1, -1):
        moved = False
        while 0 <= at + step < len(GRID) and loss(GRID[at + step]) < loss(GRID[at]):
            at += step
            moved = True
        if moved:
            break
    return GRID[at]
