"""Serving, and the settings of it: serve, config check, config show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregator.cli.options import DEFAULT_STATE, Config, Json, MaybeFleet, State, print_json

config = typer.Typer(
    help="The settings of the daemon: are they in order, and which are in force.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def serve(
    job_file: Annotated[
        Path | None, typer.Argument(help="The one job to serve, in TOML; see docs/job.md.")
    ] = None,
    config_file: Config = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the state; with -c the one above those of jobs. "
            "[TUNEFLEET_STATE; default: aggregator-state, or in --dir]"
        ),
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(help="mqtt://host:port; without it an embedded broker is started."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of the embedded broker, 1883 if not given (0: a free one).",
            min=0,
            max=65535,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="The fleet's folder: its broker, its keys, and enrolment."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="File of the signing key, which devices remember (default: this user's, the same "
            "for all jobs; with --dir the fleet's). [TUNEFLEET_KEY]"
        ),
    ] = None,
    enroll_port: Annotated[
        int | None,
        typer.Option(
            help="Port of enrolment, with --dir (0: none; default: the fleet's).", min=0, max=65535
        ),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an artifact set (export-onnx), for devices without torch to fetch. "
            "[TUNEFLEET_ONNX]"
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What merges: plain (this process), or ray (the cluster of RAY_ADDRESS, or one "
            "on this machine)."
        ),
    ] = None,
    shared_intake: Annotated[
        bool,
        typer.Option(
            "--shared-intake",
            help="Share uploads with `aggregator intake` processes, by MQTT shared subscriptions.",
        ),
    ] = False,
    page: Annotated[
        int | None,
        typer.Option(
            help="Serve the live page and its API on this port (0: a free one).", min=0, max=65535
        ),
    ] = None,
    page_host: Annotated[
        str | None,
        typer.Option(help="Address of the page (default 127.0.0.1); others need a token and TLS."),
    ] = None,
    exit_when_done: Annotated[bool, typer.Option(help="End after the last round.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="End at once if the broker is not up yet.")
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(help="Tell events from this level on: debug, info, warning, error."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console, plain or json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
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
    from aggregator.merging import check_engine

    known = settings.read(config_file, {"dir": folder}, os.environ)
    for file in known.settings.jobs:
        job, _ = check_settings(read_fields(file), str(file))
        check_engine(job, known.settings.engine)
        typer.echo(f"{file}: job {job.job!r} is in order, but for its model: serving describes it")
    if known.settings.dir is not None:
        from aggregator.enrol.folder import FleetFolder

        FleetFolder(known.settings.dir)
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
