"""Serving, and the settings of it: serve, config check, config show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator.cli import serve_options
from aggregator.cli.options import DEFAULT_STATE, Config, Json, MaybeFleet, State, print_json

config = typer.Typer(
    help="The settings of the daemon: are they in order, and which are in force.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def serve(
    job_file: serve_options.JobFile = None,
    config_file: Config = None,
    state: serve_options.State = None,
    broker: serve_options.Broker = None,
    port: serve_options.Port = None,
    folder: serve_options.Folder = None,
    key: serve_options.Key = None,
    enroll_port: serve_options.EnrollPort = None,
    onnx: serve_options.Onnx = None,
    engine: serve_options.Engine = None,
    shared_intake: serve_options.SharedIntake = False,
    page: serve_options.Page = None,
    page_host: serve_options.PageHost = None,
    exit_when_done: serve_options.ExitWhenDone = False,
    no_wait: serve_options.NoWait = False,
    log_level: serve_options.LogLevel = None,
    log_format: serve_options.LogFormat = None,
    as_json: serve_options.JsonEvents = False,
) -> None:
    """Serve a job, or all of a settings file (-c): take updates, merge, broadcast versions.

    SIGHUP reads the files again; SIGTERM takes in and answers what has come, and ends.
    """
    from aggregator import settings
    from aggregator.errors import ConfigError
    from aggregator.logs import open_log
    from aggregator.serving import serve as run

    if (job_file is None) == (config_file is None):
        raise ConfigError(
            "name one job file (aggregator serve job.toml), or the daemon's settings "
            "(aggregator serve -c fleet.toml)"
        )
    log = {"level": log_level, "format": "json" if as_json else log_format}
    shown = {"port": page, "host": page_host}
    flags: dict[str, Any] = {
        "dir": folder,
        "state": state,
        "broker": broker,
        "port": port,
        "key": key,
        "enroll_port": enroll_port,
        "onnx": onnx,
        "engine": engine,
        "shared_intake": shared_intake or None,
        "exit_when_done": exit_when_done or None,
        "wait_for_broker": False if no_wait else None,
        "page": {name: value for name, value in shown.items() if value is not None} or None,
        "log": {name: value for name, value in log.items() if value is not None} or None,
    }
    known = settings.read(config_file, flags, os.environ)
    run(known, job_file, open_log(known.settings.log.format, known.settings.log.level))


def intake(
    job_file: Annotated[Path, typer.Argument(help="The job that is served, as `serve` has it.")],
    name: Annotated[str, typer.Option(help="Name of this process, another for each: say 1.")],
    broker: Annotated[str, typer.Option(help="mqtt://host:port, as `serve` has it.")],
    state: State = None,
    key: Annotated[
        Path | None,
        typer.Option(help="File of the signing key, as `serve` has it.", envvar="TUNEFLEET_KEY"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take uploads in beside `aggregator serve --shared-intake`, on the job's own state folder."""
    from aggregator.config import check_settings, read_fields
    from aggregator.identity import signing_key
    from aggregator.logs import open_log
    from aggregator.shared_intake import SharedIntake, check_name
    from aggregator.store import Store
    from protocol.files import lock_folder
    from protocol.transport import BrokerAddress

    where = state or DEFAULT_STATE
    job, _ = check_settings(read_fields(job_file), str(job_file))
    place, instead = where / "intakes" / check_name(name), "give this one another --name"
    with lock_folder(place, "intake", instead=instead):
        store = Store(where)
        address, log = BrokerAddress.parse(broker), open_log("json" if as_json else "auto", "info")
        SharedIntake(name, job.job, store, address, log, key=signing_key(where, key)).run()


@config.command()
def check(config_file: Config = None, folder: MaybeFleet = None) -> None:
    """Say whether the settings are in order, with all the job files that they name."""
    from aggregator import settings
    from aggregator.config import check_settings, read_fields
    from aggregator.enrol.folder import FleetFolder
    from aggregator.idle_settings import idle_settings
    from aggregator.merging import check_engine
    from aggregator.page.opening import check_page
    from aggregator.tracking.tracker import check_sinks

    known = settings.read(config_file, {"dir": folder}, os.environ)
    for file in known.settings.jobs:
        job, policy = check_settings(read_fields(file), str(file))
        check_engine(job, known.settings.engine)
        for idle in idle_settings(job, policy):
            typer.echo(f"note: {file}: {idle}", err=True)
        typer.echo(f"{file}: job {job.job!r} is in order, but for its model: serving describes it")
    fleet = FleetFolder(known.settings.dir) if known.settings.dir is not None else None
    if known.settings.page.port is not None:
        check_page(known.settings.page, fleet)
    check_sinks(known.settings.tracking.sinks)
    if not known.settings.jobs:
        typer.echo("note: no job is named: serving needs one, or one that was created", err=True)
    typer.echo(f"{config_file or 'the environment'}: in order")


@config.command()
def show(config_file: Config = None, folder: MaybeFleet = None, as_json: Json = False) -> None:
    """Show the settings that are in force, and where each comes from."""
    from aggregator import settings
    from aggregator.cli.tables import Table

    known = settings.read(config_file, {"dir": folder}, os.environ)
    values = settings.flat_values(known.settings)
    if as_json:
        told = {k: {"value": v, "from": known.source(k)} for k, v in values.items()}
        print_json(told)
        return
    rows = [[name, _shown(value), known.source(name)] for name, value in values.items()]
    Table(["setting", "value", "from"], rows).show()


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return (
        "none"
        if value in (None, "")
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
