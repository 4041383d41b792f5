"""All jobs that a daemon serves, or has served, from one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from aggregator.errors import StoreError
from aggregator.view.database import FILE
from aggregator.view.models import FleetView, JobView
from aggregator.view.state import StateView
from protocol.files import folder_holder


def state_folders(root: Path) -> list[Path]:
    """Return the state folders of jobs in a folder, and the folder itself first if it is one.

    It may be both: `aggregator serve job.toml` and `serve -c fleet.toml` have the same default.
    """
    own = [root] if (root / FILE).is_file() else []
    return own + sorted(path.parent for path in root.glob(f"*/{FILE}"))


class FleetReader:
    """Open the states of jobs in a folder as they are asked for. One thread at a time may use it.

    `root` is a fleet's `state`, a folder with a state folder for each job, or one job's.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._open: dict[Path, StateView] = {}

    def close(self) -> None:
        for view in self._open.values():
            view.close()
        self._open.clear()

    def fleet(self) -> FleetView:
        """Return how all jobs stand; a state that can't be read is named with why."""
        jobs: dict[str, JobView] = {}
        unreadable: dict[str, str] = {}
        for folder in self._folders():
            try:
                job = self.state(folder).job()
                jobs[job.name] = job
            except StoreError as error:
                unreadable[str(folder)] = str(error)
        return FleetView(self._clock(), tuple(jobs[name] for name in sorted(jobs)), unreadable)

    def jobs(self) -> dict[str, StateView]:
        """Return job → its state, of those that can be read."""
        found: dict[str, StateView] = {}
        for folder in self._folders():
            try:
                view = self.state(folder)
                found[view.settings()["job"]] = view
            except StoreError:
                continue
        return dict(sorted(found.items()))

    def _folders(self) -> list[Path]:
        """Return the state folders, so that of two of one job the one to be seen comes last.

        It is the one that is served now, else that of several jobs' daemon.
        """
        return sorted(state_folders(self.root), key=lambda one: folder_holder(one) is not None)

    def state(self, folder: Path) -> StateView:
        """Return the view of a state folder, which stays open.

        Raises:
            StoreError: there is no state there, or it can't be read.
        """
        if folder not in self._open:
            self._open[folder] = StateView(folder, self._clock)
        return self._open[folder]

    def find(self, job: str) -> StateView:
        """Return the view of a job; of the only one, where no name is given.

        Raises:
            StoreError: there is no such job here, or several to choose from.
        """
        found = self.jobs()
        if job in found:
            return found[job]
        if not found:
            raise StoreError(
                f"there is no job's state in {self.root}; `aggregator serve` makes one, and "
                "--state, --dir or -c names where"
            )
        if not job and len(found) == 1:
            return next(iter(found.values()))
        raise StoreError(_which(job, found))


def _which(job: str, found: Iterable[str]) -> str:
    said = f"there is no job {job!r} here" if job else "there are several jobs here"
    return f"{said}; name one of {', '.join(found)}"
