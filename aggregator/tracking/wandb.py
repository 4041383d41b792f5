"""Weights & Biases: offline unless it is told otherwise, to be sent by `wandb sync`."""

from __future__ import annotations

import re

from aggregator.tracking.base import Run, Values


class WandbSink:
    """Write a run of the job's name; a restart goes on with it."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._run = wandb.init(
            project=run.options.get("project", "tunefleet"),
            name=run.job,
            id=re.sub(r"[^a-zA-Z0-9_-]", "-", run.job),
            resume="allow",
            dir=str(run.folder),
            mode="online" if run.options.get("mode") == "online" else "offline",
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
