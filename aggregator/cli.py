"""The `aggregator` command."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.cli import run_command

if TYPE_CHECKING:
    from protocol.transport import BrokerAddress

app = typer.Typer(
    help="Merge what a fleet of devices has learned, and send it back to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

State = Annotated[
    Path, typer.Option(help="Folder of the aggregator's state.", envvar="TUNEFLEET_STATE")
]


@app.callback()
def _group() -> None:
    """Keep subcommands even while there are few."""


@app.command()
def serve(
    job_file: Annotated[Path, typer.Argument(help="The job, in TOML; see docs/job.md.")],
    state: State = Path("aggregator-state"),
    broker: Annotated[
        str, typer.Option(help="mqtt://host:port; without it an embedded broker is started.")
    ] = "",
    port: Annotated[
        int, typer.Option(help="Port of the embedded broker (0: a free one).", min=0, max=65535)
    ] = 1883,
    exit_when_done: Annotated[bool, typer.Option(help="End after the last round.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
) -> None:
    """Serve a job: take updates, merge them, broadcast versions, until it is stopped."""
    from aggregator.config import read_job
    from aggregator.daemon import Daemon
    from aggregator.store import Store
    from protocol.events import EventLog
    from protocol.files import lock_folder
    from protocol.transport import BrokerAddress

    events = EventLog(as_json=as_json)
    job, policy = read_job(job_file)
    with ExitStack() as stack:
        stack.enter_context(lock_folder(state, "aggregator"))
        if broker:
            address = BrokerAddress.parse(broker)
        else:
            address = _embedded(stack, port)
            events.emit("broker", address=str(address), note="embedded: for trial, loopback only")
        Daemon(job, policy, Store(state), address, events, exit_when_done=exit_when_done).run()


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to.")],
    state: State = Path("aggregator-state"),
    version: Annotated[int | None, typer.Option(help="Version (default: the newest).")] = None,
) -> None:
    """Write the shared adapter as a directory that PeftModel.from_pretrained loads."""
    from aggregator.export import export_adapter

    number = export_adapter(state, out, version=version)
    typer.echo(f"version {number} is in {out}")


def _embedded(stack: ExitStack, port: int) -> BrokerAddress:
    """Start the embedded broker for as long as the stack lasts.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib.util

    from aggregator.errors import ConfigError

    if importlib.util.find_spec("amqtt") is None:
        raise ConfigError(
            "the embedded broker needs the extra: pip install 'tunefleet[aggregator]'; or name a "
            "broker with --broker"
        )
    from protocol.broker import EmbeddedBroker

    return stack.enter_context(EmbeddedBroker(port=port)).address


def main() -> None:
    """Run the command."""
    run_command(app)
