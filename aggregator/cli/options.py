"""Options that several commands have, and where what they name is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aggregator.view import FleetReader

DEFAULT_STATE = Path("aggregator-state")
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The daemon's settings, in TOML.")
]
Fleet = Annotated[
    Path, typer.Option("--dir", help="The fleet's folder, made by `aggregator init`.")
]
MaybeFleet = Annotated[Path | None, typer.Option("--dir", help="The fleet's folder.")]
State = Annotated[
    Path | None,
    typer.Option(
        help=f"Folder of the aggregator's state (default: {DEFAULT_STATE}, or in --dir).",
        envvar="TUNEFLEET_STATE",
    ),
]
States = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help=f"A job's state folder, or the one above several (default: {DEFAULT_STATE}).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobName = Annotated[
    str, typer.Option("--job", help="The job's name; needed where there are several.")
]


def root_of(config: Path | None, folder: Path | None, state: Path | None) -> Path:
    """Return the folder of states that options, environment and settings name.

    Raises:
        ConfigError: the settings can't be read.
    """
    from aggregator import settings
    from aggregator.serving import root_of_states

    known = settings.read(config, {"dir": folder, "state": state}, os.environ)
    return root_of_states(known.settings, known.folder)


def reader(config: Path | None, folder: Path | None, state: Path | None) -> FleetReader:
    """Return what reads those states."""
    from aggregator.view import FleetReader

    return FleetReader(root_of(config, folder, state))


def print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value))
