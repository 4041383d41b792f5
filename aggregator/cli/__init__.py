"""The `aggregator` command. One module a topic; what is heavy is imported by who needs it."""

from __future__ import annotations

import os

import typer

from aggregator.cli import adapters, fleet, jobs, look, serving
from protocol.cli import run_command

app = typer.Typer(
    help="Merge what a fleet of devices has learned, and send it back to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What says how many threads numpy's libraries take. On a machine that is busy with other things
more of them spend their time waiting for each other, and a merge takes many times as long."""

app.command()(fleet.init)
app.command()(fleet.enroll)
app.command()(fleet.revoke)
app.command("page-token")(fleet.page_token)
app.command()(serving.serve)
app.command()(serving.intake)
app.command()(look.status)
app.command()(look.devices)
app.command()(look.rounds)
app.add_typer(look.device, name="device")
app.add_typer(jobs.app, name="job")
app.add_typer(serving.config, name="config")
app.command()(jobs.withdraw)
app.command("export-onnx")(adapters.export_onnx)
app.command()(adapters.export)


def main() -> None:
    """Run the command."""
    for name in BLAS_THREADS:  # read once, when numpy is first imported: later than here
        os.environ.setdefault(name, "1")
    run_command(app)
