"""A fleet and who is in it: init, enroll, revoke."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from aggregator.cli.options import Fleet, MaybeFleet


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make for the fleet.")],
    host: Annotated[
        list[str],
        typer.Option(help="Name or address by which devices reach this computer; may be repeated."),
    ],
    port: Annotated[int, typer.Option(help="Port of the broker.", min=1, max=65535)] = 8883,
    enroll_port: Annotated[int, typer.Option(help="Port of enrolment.", min=1, max=65535)] = 8884,
    bind: Annotated[str, typer.Option(help="Address to listen on (default: all).")] = "",
) -> None:
    """Make a fleet: its keys and certificates, and the settings of its broker."""
    from aggregator.enrol.create import create_fleet
    from aggregator.enrol.folder import FleetSettings

    settings = FleetSettings(hosts=host, port=port, enrol_port=enroll_port, bind=bind)
    fleet = create_fleet(folder, settings, datetime.now(timezone.utc))
    typer.echo(f"the fleet is in {fleet.path}; keep it to yourself, ca.key above all")
    start = f"mosquitto -c {quote(str(fleet.path / 'mosquitto.conf'))}"
    typer.echo("in a terminal each, or as services: see the README, or the units in systemd")
    typer.echo(f"1. the broker:     ulimit -n $(ulimit -Hn); {start}")
    typer.echo(f"2. the aggregator: aggregator serve job.toml --dir {quote(str(fleet.path))}")
    typer.echo(f"3. each device:    aggregator enroll NAME --dir {quote(str(fleet.path))}")


def enroll(
    name: Annotated[str, typer.Argument(help="What the device is to be called.")],
    folder: Fleet,
    hours: Annotated[float, typer.Option(help="How long the token is good for.")] = 24.0,
) -> None:
    """Print a one-time token that lets a device in; it is asked for while `serve` runs."""
    from aggregator.enrol.folder import FleetFolder, check_device
    from protocol.link import in_url

    fleet = FleetFolder(folder)
    token = fleet.issue_token(check_device(name), hours=hours, now=datetime.now(timezone.utc))
    typer.echo(str(token))
    where = f"https://{in_url(fleet.settings.hosts[0])}:{fleet.settings.enrol_port}"
    typer.echo(
        f"good once, for {hours:g} hours; on {name}: edge-client join {where} --token {token}",
        err=True,
    )


def revoke(name: Annotated[str, typer.Argument(help="The device.")], folder: Fleet) -> None:
    """Put a device out of the fleet; to let it in again, enroll it anew."""
    from aggregator.enrol.folder import FleetFolder

    fleet = FleetFolder(folder)
    if not fleet.revoke(name, datetime.now(timezone.utc)):
        typer.echo(f"{name} had not joined: its token is worth nothing now")
        return
    broker = fleet.reload_broker()
    told = (
        f"Mosquitto (process {broker}) has been told"
        if broker is not None
        else "tell Mosquitto: systemctl reload mosquitto, or send it SIGHUP"
    )
    typer.echo(
        f"{name} is revoked: the aggregator drops all it sends; {told}; a connection that is open "
        "now stays open, but for what the aggregator drops, until Mosquitto is restarted"
    )


def page_token(
    folder: MaybeFleet = None,
    file: Annotated[Path | None, typer.Option(help="File of the token, made if need be.")] = None,
) -> None:
    """Print the token of the live page, which is made if need be: who has it sees and steers all.

    It is in the fleet's folder, where `serve --dir` finds it, or in a file that `token_file` names.
    """
    from aggregator.errors import ConfigError
    from aggregator.page.opening import TOKEN_FILE, make_token

    if (folder is None) == (file is None):
        raise ConfigError("name the fleet's folder with --dir, or a file with --file")
    where = file if file is not None else fleet_folder(folder) / TOKEN_FILE
    typer.echo(make_token(where))


def fleet_folder(path: Path | None) -> Path:
    """Return the path of a fleet's folder, which is one."""
    from aggregator.enrol.folder import FleetFolder

    assert path is not None, "it is named"
    return FleetFolder(path).path
