"""Options of `aggregator serve`: each comes before what the environment and the settings file say.

None, or False for what is switched on: it is not given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[
    Path | None, typer.Argument(help="The one job to serve, in TOML; see docs/job.md.")
]
State = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the state; with -c the one above those of jobs. "
        "[TUNEFLEET_STATE; default: aggregator-state, or in --dir]"
    ),
]
Broker = Annotated[
    str | None, typer.Option(help="mqtt://host:port; without it an embedded broker is started.")
]
Port = Annotated[
    int | None,
    typer.Option(
        help="Port of the embedded broker, 1883 if not given (0: a free one).", min=0, max=65535
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="The fleet's folder: its broker, its keys, and enrolment."),
]
Key = Annotated[
    Path | None,
    typer.Option(
        help="File of the signing key, which devices remember (default: this user's, the same "
        "for all jobs; with --dir the fleet's). [TUNEFLEET_KEY]"
    ),
]
EnrollPort = Annotated[
    int | None,
    typer.Option(
        help="Port of enrolment, with --dir (0: none; default: the fleet's).", min=0, max=65535
    ),
]
Onnx = Annotated[
    Path | None,
    typer.Option(
        help="Folder of an artifact set (export-onnx), for devices without torch to fetch. "
        "[TUNEFLEET_ONNX]"
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="What merges: plain (this process), or ray (the cluster of RAY_ADDRESS, or one "
        "on this machine)."
    ),
]
SharedIntake = Annotated[
    bool,
    typer.Option(
        "--shared-intake",
        help="Share uploads with `aggregator intake` processes, by MQTT shared subscriptions.",
    ),
]
Page = Annotated[
    int | None,
    typer.Option(
        help="Serve the live page and its API on this port (0: a free one).", min=0, max=65535
    ),
]
PageHost = Annotated[
    str | None,
    typer.Option(help="Address of the page (default 127.0.0.1); others need a token and TLS."),
]
ExitWhenDone = Annotated[bool, typer.Option(help="End after the last round.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="End at once if the broker is not up yet.")]
LogLevel = Annotated[
    str | None,
    typer.Option(help="Tell events from this level on: debug, info, warning, error."),
]
LogFormat = Annotated[str | None, typer.Option(help="auto, console, plain or json.")]
JsonEvents = Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")]
