"""Jobs: taken off a broker, and what is asked of one that is served."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator.cli.options import Config, Json, MaybeFleet, States, print_json, reader, root_of

if TYPE_CHECKING:
    from aggregator.control import Answer, JobCommand

app = typer.Typer(
    help="Jobs of the aggregator that runs: create, pause, resume, change, roll back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="The job's name; may be left out where there is one.")]


def withdraw(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    broker: Annotated[
        str, typer.Option(help="mqtt://host:port (default: that of the fleet, with --dir).")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The fleet's folder: its broker, and its keys.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even while devices are online in it.")
    ] = False,
) -> None:
    """Take a job off a broker, so that devices don't enter it any more; end its aggregator first.

    Its state folder stays as it is: the job can be served from it again.
    """
    from aggregator.enrol.folder import FleetFolder
    from aggregator.errors import ConfigError
    from aggregator.withdraw import withdraw as take_off
    from protocol.transport import BrokerAddress

    with ExitStack() as stack:
        address = BrokerAddress.parse(broker) if broker else None
        fleet = FleetFolder(folder) if folder is not None else None
        if fleet is not None:
            stack.enter_context(fleet.served_here())
            address = address or fleet.broker_here
        if address is None:
            raise ConfigError("name the broker that has the job with --broker, or --dir")
        done = take_off(address, job, tls=fleet.tls if fleet else None, force=force)
    if not done.cleared:
        typer.echo(f"{address} has nothing of job {job!r}")
        return
    stays = f"; statuses that only their devices may clear: {done.left}" if done.left else ""
    typer.echo(f"job {job!r} is off {address}: {done.cleared} messages cleared{stays}")


@app.command()
def create(
    job_file: Annotated[Path, typer.Argument(help="The job, in TOML; see docs/job.md.")],
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Have the aggregator that runs serve one more job, from now on and after each restart."""
    from dataclasses import asdict

    from aggregator.config import read_job
    from aggregator.control import CreateJob, ask

    job, policy = read_job(job_file)
    command = CreateJob(job.model_dump(mode="json"), asdict(policy))
    _show(ask(root_of(config, folder, state), command, by="command line"), as_json)


@app.command()
def pause(
    job: Name = "",
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Open and merge no more rounds; what devices send is still counted."""
    from aggregator.control import PauseJob

    _ask(job, PauseJob(), config, folder, state, as_json)


@app.command()
def resume(
    job: Name = "",
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Go on with a job that was paused; the open round has the time that it had left."""
    from aggregator.control import ResumeJob

    _ask(job, ResumeJob(), config, folder, state, as_json)


@app.command("set")
def change(
    job: Name = "",
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", help="Seconds that a round has.")
    ] = None,
    quorum: Annotated[
        int | None, typer.Option(help="Updates without which a round is not merged.")
    ] = None,
    min_devices: Annotated[
        int | None, typer.Option(help="Devices that the first round waits for.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the fleet that is asked first.")
    ] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option(help="Setting that is the job file's again, say quorum; may be repeated."),
    ] = None,
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Change how the rounds of a job are run, from now on and after each restart."""
    from aggregator.control import ChangePolicy

    names = tuple(name.replace("-", "_") for name in reset or ())
    command = ChangePolicy(deadline_s, quorum, min_devices, fraction, reset=names)
    _ask(job, command, config, folder, state, as_json)


@app.command("roll-back")
def roll_back(
    version: Annotated[int, typer.Argument(help="The version to go on from.")],
    job: Annotated[
        str, typer.Option("--job", help="The job's name, where there are several.")
    ] = "",
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Go on from an older version of the adapter; the open round ends, and takes what has come."""
    from aggregator.control import RollBack

    _ask(job, RollBack(version), config, folder, state, as_json)


def _ask(
    job: str,
    command: JobCommand,
    config: Path | None,
    folder: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    from aggregator.control import ask

    states = reader(config, folder, state)
    try:
        where = states.find(job).folder
    finally:
        states.close()
    _show(ask(where, command, by="command line"), as_json)


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print_json({"said": answer.said, **answer.fields})
    else:
        typer.echo(answer.said)
