"""MLflow: in a folder of its own, or at a tracking server."""

from __future__ import annotations

import os
import time

from aggregator.tracking.base import Run, Values, flat_settings

RUN_FILE = "run-id"


class MlflowSink:
    """Write a run of the job's name; a restart goes on with it."""

    def __init__(self, run: Run) -> None:
        # Without a database's packages a folder is all there is; MLflow wants that to be said.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        uri = run.options.get("uri") or run.folder.absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name = run.options.get("experiment", "tunefleet")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        note = run.folder / RUN_FILE
        if note.is_file():
            self._id = note.read_text().strip()
            return
        self._id = self._client.create_run(experiment, run_name=run.job).info.run_id
        for setting, value in flat_settings(run.settings).items():
            self._client.log_param(self._id, setting, value)
        note.write_text(self._id)

    def log(self, step: int, values: Values) -> None:
        now_ms = int(time.time() * 1000)
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, now_ms, step)

    def close(self) -> None:
        self._client.set_terminated(self._id)
