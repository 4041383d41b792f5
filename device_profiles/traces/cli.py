"""`fleet-replay traces` and `fleet-replay import`: write traces into a folder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from device_profiles.traces.format import Trace

POLICY_FILE = "policy.toml"


class Kind(str, Enum):
    """Whose recordings these are."""

    fedscale = "fedscale"
    flash = "flash"
    sbc_bench = "sbc-bench"
    bandwidth = "bandwidth"


Folder = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where to write them: a new folder.")
]


def add_commands(app: typer.Typer) -> None:
    """Add the commands that make traces."""
    app.command(name="import")(import_traces)
    app.command()(traces)


def import_traces(
    kind: Annotated[Kind, typer.Argument(help="What the files are.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES…", help="What to read.")],
    out: Folder,
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="Recorded profile of the devices, for all of them.")
    ] = "",
    licence: Annotated[
        str, typer.Option(metavar="TEXT", help="What the recordings may be used for.")
    ] = "",
) -> None:
    """Make traces of what others have recorded: FedScale, FLASH, sbc-bench, bandwidth as CSV."""
    from dataclasses import replace

    from device_profiles.errors import TraceError
    from device_profiles.schema import check_bundled
    from device_profiles.traces.imports.common import Imported
    from device_profiles.traces.imports.read import read_recordings

    if profile:
        check_bundled(profile)
    _check_new(out)
    found: Imported = read_recordings(kind.value, files)
    for why in found.left_out:
        typer.echo(f"left out: {why}", err=True)
    if not found.traces:
        raise TraceError(", ".join(map(str, files)), "nothing in it could be made a trace")
    named = [
        replace(one, profile=profile or one.profile, licence=licence or one.licence)
        for one in found.traces
    ]
    _write(out, named)


def traces(
    scenario: Annotated[
        str, typer.Option(metavar="NAME", help="Which; none: list the scenarios.")
    ] = "",
    devices: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many.")] = 10,
    seed: Annotated[int, typer.Option(help="Draws what happens to each.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write them (default: runs/traces/SCENARIO)."),
    ] = None,
) -> None:
    """Make the traces of a scenario, the same for the same seed, and its owners' policy."""
    from device_profiles.traces.scenarios import SCENARIOS, find_scenario
    from protocol.files import write_durably

    if not scenario:
        for name, one in SCENARIOS.items():
            typer.echo(f"{name}: {one.says}")
            for must in one.holds:
                typer.echo(f"    must hold: {must}")
        return
    found = find_scenario(scenario)
    folder = out or Path("runs", "traces", scenario)
    _check_new(folder)
    _write(folder, found.traces(devices, seed))
    if found.policy:
        write_durably(folder / POLICY_FILE, found.policy.encode())
        typer.echo(f"the owners' policy in {folder / POLICY_FILE}")


def _check_new(folder: Path) -> None:
    """Refuse a folder that holds traces: what is read from it later would be both."""
    from device_profiles.errors import TraceError
    from device_profiles.traces.format import SUFFIX

    if folder.is_dir() and any(folder.glob(f"*{SUFFIX}")):
        raise TraceError(folder, "holds traces already; name a new folder with --out")


def _write(folder: Path, made: list[Trace]) -> None:
    from device_profiles.traces.format import SUFFIX, write_trace

    for trace in made:
        write_trace(folder / f"{trace.name}{SUFFIX}", trace)
    typer.echo(f"{len(made)} {'trace' if len(made) == 1 else 'traces'} in {folder}")
