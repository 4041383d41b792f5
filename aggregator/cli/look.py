"""Looking at what is served, running or not: status, devices, rounds, device show."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator.cli.options import (
    Config,
    JobName,
    Json,
    MaybeFleet,
    States,
    print_json,
    reader,
)

if TYPE_CHECKING:
    from aggregator.view import DeviceDetail, DeviceView, JobView, RoundView

device = typer.Typer(help="One device.", no_args_is_help=True, rich_markup_mode=None)
BYTES_PER_MIB = 2**20


def status(
    config: Config = None, folder: MaybeFleet = None, state: States = None, as_json: Json = False
) -> None:
    """Show how the jobs stand: round, version, devices, and what each waits for."""
    from aggregator.cli.tables import Table
    from aggregator.errors import StoreError

    with closing(reader(config, folder, state)) as states:
        fleet = states.fleet()
    if not fleet.jobs and not fleet.unreadable:
        raise StoreError(
            f"there is no job's state in {states.root}; `aggregator serve` makes one, and --state, "
            "--dir or -c names where"
        )
    if as_json:
        print_json({**asdict(fleet), "running": fleet.running})
        return
    columns = ["job", "state", "round ", "version ", "online ", "ready ", "waits for"]
    Table(columns, [_job(job) for job in fleet.jobs], "jobs").show()
    for why in fleet.unreadable.values():
        typer.echo(f"note: {why}", err=True)


def _job(job: JobView) -> list[str]:
    state = "paused" if job.paused is not None else job.state
    return [
        job.name,
        state if job.running else f"not running ({state})",
        f"{job.round}/{job.rounds}",
        str(job.version),
        f"{job.devices.online}/{job.devices.known}",
        str(job.devices.ready),
        job.waiting_for,
    ]


def devices(
    job: JobName = "",
    only: Annotated[
        str,
        typer.Option(
            help="Those that are so: online, offline, quarantined, idle, training, waiting …"
        ),
    ] = "",
    search: Annotated[str, typer.Option(help="Those with this in their name.")] = "",
    sort: Annotated[str, typer.Option(help="name, state, rank, seen, up or round.")] = "name",
    limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = 100,
    offset: Annotated[int, typer.Option(help="After so many.", min=0)] = 0,
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """List a job's devices: how each is, and why it does not take part."""
    from aggregator.cli.tables import Table
    from aggregator.errors import ConfigError
    from aggregator.view.crowd import LETTERS
    from aggregator.view.devices import ORDERS

    known = ("online", *LETTERS)
    if only and only not in known:
        raise ConfigError(f"--only {only}: devices are {', '.join(known)}")
    if sort not in ORDERS:
        raise ConfigError(f"--sort {sort}: devices are sorted by {', '.join(ORDERS)}")
    with closing(reader(config, folder, state)) as states:
        view = states.find(job)
        page = view.devices(
            state=only,
            search=search,
            order=sort,
            descending=sort != "name",
            offset=offset,
            limit=limit,
        )
        of = view.counts().known
    if as_json:
        print_json([asdict(one) for one in page])
        return
    columns = ["device", "state", "rank ", "last seen", "rounds ", "up ", "down ", "waits for"]
    Table(columns, [_device(one) for one in page], f"{len(page)} of {of} devices").show()


def _device(one: DeviceView) -> list[str]:
    return [
        one.name,
        one.state if one.online else "offline",
        str(one.rank or ""),
        _when(one.last_seen),
        str(one.rounds),
        _size(one.up_bytes),
        _size(one.down_bytes),
        one.waiting_for,
    ]


def rounds(
    job: JobName = "",
    limit: Annotated[int, typer.Option(help="At most so many, the newest.", min=1)] = 20,
    before: Annotated[int | None, typer.Option(help="Those below this number.")] = None,
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """List a job's rounds: loss, merge time, updates, ranks, bytes."""
    from aggregator.cli.tables import Table

    with closing(reader(config, folder, state)) as states:
        page = states.find(job).rounds(before=before, limit=limit)
    if as_json:
        print_json([asdict(one) for one in page])
        return
    columns = ["round ", "version ", "loss ", "counted ", "refused ", "ranks", "up ", "down ",
               "merge ", "ended"]  # fmt: skip
    Table(columns, [_round(one) for one in page], "rounds").show()


def _round(one: RoundView) -> list[str]:
    ranks = " ".join(f"{rank}×{count}" for rank, count in one.ranks.items())
    return [
        str(one.number),
        "" if one.version is None else str(one.version),
        "" if one.loss is None else f"{one.loss:.4f}",
        str(one.counted),
        str(one.refused),
        ranks,
        _size(one.up_bytes),
        _size(one.down_bytes),
        "" if one.merge_s is None else f"{one.merge_s:.2f} s",
        one.note or ("open" if one.ended is None else _when(one.ended)),
    ]


@device.command()
def show(
    name: Annotated[str, typer.Argument(help="The device.")],
    job: JobName = "",
    config: Config = None,
    folder: MaybeFleet = None,
    state: States = None,
    as_json: Json = False,
) -> None:
    """Show one device: how it is, how it trains, what it did in each round, its last error."""
    from aggregator.cli.tables import Table
    from aggregator.errors import StoreError

    with closing(reader(config, folder, state)) as states:
        view = states.find(job)
        found = view.device(name)
        if found is None:
            raise StoreError(
                f"job {view.settings()['job']!r} has never heard of a device {name!r}; `aggregator "
                "devices` lists those that it has"
            )
    if as_json:
        print_json(asdict(found))
        return
    for label, value in _facts(found):
        typer.echo(f"{label:<14}{value}")
    columns = ["round ", "outcome", "rank ", "held ", "loss ", "up ", "down ", "when"]
    rows = [
        [
            str(one.round),
            "counted" if one.counted else f"refused: {one.reason}",
            str(one.rank or ""),
            str(one.held or ""),
            "" if one.loss is None else f"{one.loss:.4f}",
            _size(one.up_bytes),
            _size(one.down_bytes),
            _when(one.at),
        ]
        for one in found.history
    ]
    if rows:
        Table(columns, rows, "rounds").show()


def _facts(found: DeviceDetail) -> list[tuple[str, str]]:
    one, plan = found.device, found.plan
    facts = [
        ("device", one.name),
        ("state", one.state if one.online else f"offline (last: {one.state})"),
        ("waits for", one.waiting_for or "nothing: it takes part"),
        ("profile", one.profile or "unknown"),
        ("last seen", _when(one.last_seen)),
        ("rank", str(one.rank or "unknown")),
    ]
    if plan is not None:
        facts.append(
            (
                "trained",
                f"rank {plan.rank_trained} → {plan.rank}, {plan.held} directions held, "
                f"{plan.modules} of {plan.of_modules} modules, {plan.examples:,} tokens "
                f"(round {plan.round})",
            )
        )
    facts += [
        ("bytes", f"{_size(one.up_bytes)} up, {_size(one.down_bytes)} down (reckoned)"),
        ("last error", one.last_error or "none"),
    ]
    if one.quarantined_until is not None:
        facts.append(("kept out", f"until {_when(one.quarantined_until)}"))
    return facts


def _size(size: int) -> str:
    if size < BYTES_PER_MIB:
        return f"{size / 1024:.0f} KiB" if size else ""
    return f"{size / BYTES_PER_MIB:.1f} MiB"


def _when(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
