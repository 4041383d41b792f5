"""The `aggregator` command."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from protocol.cli import run_command
from protocol.extras import how_to_install
from protocol.link import in_url

if TYPE_CHECKING:
    from aggregator.enrol.folder import FleetFolder
    from protocol.events import EventLog
    from protocol.transport import BrokerAddress

app = typer.Typer(
    help="Merge what a fleet of devices has learned, and send it back to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What says how many threads numpy's libraries take. On a machine that is busy with other things
more of them spend their time waiting for each other, and a merge takes many times as long."""
DEFAULT_STATE = Path("aggregator-state")
EngineName = Literal["plain", "ray"]
State = Annotated[
    Path | None,
    typer.Option(
        help=f"Folder of the aggregator's state (default: {DEFAULT_STATE}, or in --dir).",
        envvar="TUNEFLEET_STATE",
    ),
]


@app.callback()
def _group() -> None:
    """Keep subcommands even while there are few."""


Fleet = Annotated[
    Path, typer.Option("--dir", help="The fleet's folder, made by `aggregator init`.")
]


@app.command()
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


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="What the device is to be called.")],
    folder: Fleet,
    hours: Annotated[float, typer.Option(help="How long the token is good for.")] = 24.0,
) -> None:
    """Print a one-time token that lets a device in; it is asked for while `serve` runs."""
    from aggregator.enrol.folder import FleetFolder, check_device

    fleet = FleetFolder(folder)
    token = fleet.issue_token(check_device(name), hours=hours, now=datetime.now(timezone.utc))
    typer.echo(str(token))
    where = f"https://{in_url(fleet.settings.hosts[0])}:{fleet.settings.enrol_port}"
    typer.echo(
        f"good once, for {hours:g} hours; on {name}: edge-client join {where} --token {token}",
        err=True,
    )


@app.command()
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


@app.command()
def serve(
    job_file: Annotated[Path, typer.Argument(help="The job, in TOML; see docs/job.md.")],
    state: State = None,
    broker: Annotated[
        str, typer.Option(help="mqtt://host:port; without it an embedded broker is started.")
    ] = "",
    port: Annotated[
        int, typer.Option(help="Port of the embedded broker (0: a free one).", min=0, max=65535)
    ] = 1883,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="The fleet's folder: its broker, its keys, and enrolment."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="File of the signing key, which devices remember (default: this user's, the same "
            "for all jobs; with --dir the fleet's).",
            envvar="TUNEFLEET_KEY",
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
            help="Folder of an artifact set (export-onnx), for devices without torch to fetch.",
            envvar="TUNEFLEET_ONNX",
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="What merges: this process, or a Ray cluster (RAY_ADDRESS, or its own)."),
    ] = "plain",
    shared_intake: Annotated[
        bool,
        typer.Option(
            "--shared-intake",
            help="Share uploads with `aggregator intake` processes, by MQTT shared subscriptions.",
        ),
    ] = False,
    exit_when_done: Annotated[bool, typer.Option(help="End after the last round.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="End at once if the broker is not up yet.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
) -> None:
    """Serve a job: take updates, merge them, broadcast versions, until it is stopped."""
    from aggregator.config import read_job
    from aggregator.daemon import Daemon
    from aggregator.engine import open_engine
    from aggregator.errors import ConfigError
    from aggregator.identity import signing_key
    from aggregator.merging import check_engine
    from aggregator.store import Store
    from protocol.events import EventLog
    from protocol.files import lock_folder
    from protocol.transport import BrokerAddress

    events = EventLog(as_json=as_json)
    if shared_intake and (folder is not None or not broker):
        raise ConfigError(
            "--shared-intake needs a broker that shares subscriptions, named with --broker; in a "
            "fleet's folder (--dir) the aggregator's one certificate allows one connection"
        )
    if folder is None and enroll_port is not None:
        raise ConfigError("--enroll-port needs the fleet's folder: --dir")
    if folder is not None and key is not None:
        raise ConfigError(
            "a fleet has a key of its own: leave --key (TUNEFLEET_KEY) out with --dir"
        )
    job, policy = read_job(job_file)
    check_engine(job, engine)
    with ExitStack() as stack:
        address = BrokerAddress.parse(broker) if broker else None
        fleet = None if folder is None else _open_fleet(stack, folder, events, enroll_port)
        where = state or (DEFAULT_STATE if fleet is None else fleet.state(job.job))
        stack.enter_context(lock_folder(where, "aggregator"))
        if fleet is not None:
            address = address or fleet.broker_here
        if address is None:
            address = _embedded(stack, port)
            events.emit("broker", address=str(address), note="embedded: for trial, loopback only")
        membership = fleet.membership() if fleet is not None else None
        Daemon(
            job,
            policy,
            Store(where),
            address,
            events,
            key=membership.key if membership else signing_key(where, key),
            membership=membership,
            onnx=onnx,
            engine=stack.enter_context(open_engine(engine)),
            shared=shared_intake,
            exit_when_done=exit_when_done,
            wait_for_broker=not no_wait,
        ).run()


@app.command()
def intake(
    job_file: Annotated[Path, typer.Argument(help="The job that is served, as `serve` has it.")],
    name: Annotated[str, typer.Option(help="Name of this process, another for each: say 1.")],
    broker: Annotated[str, typer.Option(help="mqtt://host:port, as `serve` has it.")],
    state: State = None,
    key: Annotated[
        Path | None,
        typer.Option(help="File of the signing key, as `serve` has it.", envvar="TUNEFLEET_KEY"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
) -> None:
    """Take uploads in beside `aggregator serve --shared-intake`, on the same state folder."""
    from aggregator.config import read_policy
    from aggregator.identity import signing_key
    from aggregator.shared_intake import SharedIntake, check_name
    from aggregator.store import Store
    from protocol.events import EventLog
    from protocol.files import lock_folder
    from protocol.transport import BrokerAddress

    where = state or DEFAULT_STATE
    policy = read_policy(job_file)
    with lock_folder(where / "intakes" / check_name(name), "intake"):
        SharedIntake(
            name,
            policy,
            Store(where),
            BrokerAddress.parse(broker),
            EventLog(as_json=as_json),
            key=signing_key(where, key),
        ).run()


@app.command()
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


@app.command("export-onnx")
def export_onnx(
    model: Annotated[str, typer.Argument(help="base-tiny, a model folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact set; it is made.")],
) -> None:
    """Make what devices train a model from with ONNX Runtime, where torch is installed here."""
    from aggregator.edge import ask_edge

    said = ask_edge(
        "export-onnx",
        model,
        "--out",
        str(out),
        otherwise="exporting needs torch, which the aggregator does without: run "
        f"`edge-client export-onnx {model} --out {out}` on a computer that has it",
    )
    typer.echo(said, nl=False)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to.")],
    state: State = None,
    version: Annotated[int | None, typer.Option(help="Version (default: the newest).")] = None,
    device: Annotated[
        str, typer.Option(help="The device whose own adapter it is to be, in a job that has such.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write the shared adapter, or a device's own, as a directory for PeftModel.from_pretrained."""
    from dataclasses import asdict

    from aggregator.export import export_adapter

    done = export_adapter(state or DEFAULT_STATE, out, version=version, device=device)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    size = f"rank {done.rank}, {done.parameters:,} parameters"
    typer.echo(f"version {done.version} is in {done.folder}: {size}")


def _open_fleet(
    stack: ExitStack, path: Path, events: EventLog, enroll_port: int | None
) -> FleetFolder:
    """Open a fleet's folder for this process alone, and let devices in while the stack lasts.

    Raises:
        FolderError: it is not there, not in order, or another aggregator serves it.
        ConfigError: the port of enrolment is taken.
    """
    import importlib.util

    from aggregator.enrol.folder import FleetFolder
    from aggregator.errors import ConfigError

    fleet = FleetFolder(path)
    stack.enter_context(fleet.served_here())
    for name in fleet.renew(datetime.now(timezone.utc)):
        events.emit("renewed", file=name)
    port = fleet.settings.enrol_port if enroll_port is None else enroll_port
    if not port:
        return fleet
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        raise ConfigError(
            f"enrolment needs an extra; {how_to_install('aggregator')}; or serve without it: "
            "--enroll-port 0"
        )
    from aggregator.enrol.server import EnrolmentServer

    server = stack.enter_context(EnrolmentServer(fleet, events, port=port))
    events.emit("enrolment", port=server.port)
    return fleet


def _embedded(stack: ExitStack, port: int) -> BrokerAddress:
    """Start the embedded broker for as long as the stack lasts.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib.util

    from aggregator.errors import ConfigError

    if importlib.util.find_spec("amqtt") is None:
        raise ConfigError(
            f"the embedded broker needs an extra; {how_to_install('aggregator')}; or name a "
            "broker with --broker"
        )
    from protocol.broker import EmbeddedBroker

    return stack.enter_context(EmbeddedBroker(port=port)).address


def main() -> None:
    """Run the command."""
    for name in BLAS_THREADS:  # read once, when numpy is first imported: later than here
        os.environ.setdefault(name, "1")
    run_command(app)
