"""TensorBoard's event files, which need no TensorBoard to be written."""

from __future__ import annotations

from aggregator.tracking.base import Run, Values, flat_settings


class TensorBoardSink:
    """Write scalars, and the job's settings as a text."""

    def __init__(self, run: Run) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder), flush_secs=10)
        settings = flat_settings(run.settings)
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("job", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
