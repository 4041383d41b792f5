"""The options of `fleet-replay`, by what they are called in its commands."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

FleetFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="FLEET.toml|TRACES",
        help="A fleet file (docs/job.md; default: the demo's), or a trace or folder of traces to "
        "replay in virtual time (docs/replay.md).",
    ),
]
Out = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="Where runs are kept: each has a folder of its own in it."),
]
Seed = Annotated[
    int,
    typer.Option(metavar="NUMBER", help="Draws text, splits, order, directions, and traces."),
]
Broker = Annotated[
    str,
    typer.Option(
        metavar="URL", help="mqtt://host:port of your broker (default: one is started for the run)."
    ),
]
Rule = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How updates are merged: anchored, fedavg, hetlora, flexlora, segment, flora, geomed, "
        "krum, trust-weights, trust-validation, trust-predictions, or an installed rule (default: "
        "what the fleet says, else anchored).",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER", min=1, help="Rounds (default: the fleet's or job's, else 6; of traces 3)."
    ),
]


class Backend(str, Enum):
    """What devices train with."""

    torch = "torch"
    onnx = "onnx"
    mixed = "mixed"
    auto = "auto"


WithBackend = Annotated[
    Backend | None,
    typer.Option(
        "--backend",
        help="What devices train with (default: what the fleet says, else torch); mixed: up to "
        "half with ONNX Runtime, the smallest where a plan with it fits; auto: what fits best and "
        "is fastest.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print events, at the end the summary, as JSON Lines.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting of the job in docs/job.md, say training.steps=20; may be repeated.",
    ),
]


Devices = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=1,
        help="Virtual devices (default: one for each trace; a scenario needs it).",
    ),
]
Scenario = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="A situation instead of traces: overnight-charging, flaky-3g, memory-pressure, "
        "thermal-throttle, flash-crowd, device-churn, stale-devices.",
    ),
]
Fidelity = Annotated[
    str,
    typer.Option(
        metavar="train=N,recorded=N,headless=N",
        help="How many devices really train, replay real updates, or only take part in the "
        "protocol (default: all are recorded).",
    ),
]
Speed = Annotated[
    str,
    typer.Option(
        metavar="X",
        help="Virtual seconds a second; max: to the next event as soon as all is settled.",
    ),
]
Resolution = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0.001,
        help="How often, in virtual time, the aggregator decides at most.",
    ),
]
JobFile = Annotated[
    Path | None,
    typer.Option("--job", metavar="JOB.toml", help="A job file."),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="POLICY.toml",
        help="What every device's owner allows (default: the scenario's, or everything).",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Text of the devices that train, one each in turn; may be repeated (default: the "
        "demo's).",
    ),
]
PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        metavar="FOLDER",
        help="Recorded updates (default: made by training once at each rank, and kept).",
    ),
]
Hours = Annotated[
    float | None,
    typer.Option(
        "--until",
        metavar="HOURS",
        min=0.0,
        help="Virtual time at which the replay ends (default: 30 days).",
    ),
]
Kept = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="NUMBER",
        min=1,
        help="Training processes that are kept at a time (default: 2; with ray, one a core). Each "
        "takes the memory of libraries and base; one for each device that trains saves reading "
        "text and base again.",
    ),
]


class EngineName(str, Enum):
    """What works out what costs."""

    plain = "plain"
    ray = "ray"


WithEngine = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        help="What trains and merges: plain (this computer; default), or ray (the cluster of "
        "RAY_ADDRESS, or one on this computer).",
    ),
]
OtherEngine = Annotated[
    EngineName | None,
    typer.Option("--engine", help="What trains and merges: plain or ray (default: as then)."),
]
