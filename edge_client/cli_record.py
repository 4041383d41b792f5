"""`edge-client record`: a trace of this device, for `fleet-replay`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class RatesOf(str, Enum):
    """What the rates of a recording are."""

    port = "port"
    traffic = "traffic"


def record(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The trace: a new file.")],
    for_s: Annotated[
        float | None,
        typer.Option("--for", metavar="SECONDS", min=0, help="How long (default: until stopped)."),
    ] = None,
    every_s: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, max=3600, help="How often.")
    ] = 1.0,
    rates: Annotated[
        RatesOf,
        typer.Option(
            help="What down_mbit and up_mbit are: the port's speed, which is at least the link's, "
            "or the traffic that was counted, which is at most that."
        ),
    ] = RatesOf.port,
    name: Annotated[str, typer.Option(help="The trace's name (default: the file's).")] = "",
    profile: Annotated[
        str, typer.Option(help="Recorded profile that this device is like, for the replay.")
    ] = "",
    root: Annotated[
        Path, typer.Option(help="Read /proc and /sys below this folder.", hidden=True)
    ] = Path("/"),
) -> None:
    """Record how this device fares: power, heat, memory, load and link, once a second."""
    import threading

    from device_profiles.schema import check_bundled
    from edge_client.errors import ConfigError
    from edge_client.profile import slug
    from edge_client.profile_linux import read_board
    from edge_client.record import Recorder, system_clocks
    from edge_client.record import record as write
    from protocol.signals import stop_on_signals

    if not (root / "proc/stat").exists():
        raise ConfigError(f"there is no /proc/stat below {root}: a recording reads Linux's /proc")
    if profile:
        check_bundled(profile)
    board = read_board(root) or "a device of unknown make"
    what = {"port": "rates are the port's", "traffic": "rates are traffic, not what the link can"}
    stopped = threading.Event()
    recorder = Recorder(root, every_s, rates=rates.value, clock=lambda: system_clocks()[0])
    before_s = _used_s()
    with stop_on_signals(stopped.set):
        done = write(
            out,
            recorder,
            name=slug(name or out.stem),
            profile=profile or None,
            source=f"edge-client record on {board}; {what[rates.value]}",
            every_s=every_s,
            for_s=for_s,
            clocks=system_clocks,
            wait=stopped.wait,
        )
    took = 100 * (_used_s() - before_s) / max(done.seconds, every_s)
    typer.echo(
        f"{done.samples} samples of {done.seconds:.0f} s in {out}; recording took {took:.2f} % "
        "of one core"
    )


def _used_s() -> float:
    """Return the processor time that this process and those it has asked have taken."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
