"""The `fleet-replay` command."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from device_profiles.traces.cli import add_commands
from protocol.cli import run_command

app = typer.Typer(
    help="Replay a fleet of recorded devices on this computer: real processes, a real broker, "
    "real training; only memory and link are the devices'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

add_commands(app)

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


VIRTUAL = "Replaying traces"
Devices = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=1,
        help="Virtual devices (default: one for each trace; a scenario needs it).",
        rich_help_panel=VIRTUAL,
    ),
]
Scenario = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="A situation instead of traces: overnight-charging, flaky-3g, memory-pressure, "
        "thermal-throttle, flash-crowd, device-churn, stale-devices.",
        rich_help_panel=VIRTUAL,
    ),
]
Fidelity = Annotated[
    str,
    typer.Option(
        metavar="train=N,recorded=N,headless=N",
        help="How many devices really train, replay real updates, or only take part in the "
        "protocol (default: all are recorded).",
        rich_help_panel=VIRTUAL,
    ),
]
Speed = Annotated[
    str,
    typer.Option(
        metavar="X",
        help="Virtual seconds a second; max: to the next event as soon as all is settled.",
        rich_help_panel=VIRTUAL,
    ),
]
Resolution = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0.001,
        help="How often, in virtual time, the aggregator decides at most.",
        rich_help_panel=VIRTUAL,
    ),
]
JobFile = Annotated[
    Path | None,
    typer.Option("--job", metavar="JOB.toml", help="A job file.", rich_help_panel=VIRTUAL),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="POLICY.toml",
        help="What every device's owner allows (default: the scenario's, or everything).",
        rich_help_panel=VIRTUAL,
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Text of the devices that train, one each in turn; may be repeated (default: the "
        "demo's).",
        rich_help_panel=VIRTUAL,
    ),
]
PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        metavar="FOLDER",
        help="Recorded updates (default: made by training once at each rank, and kept).",
        rich_help_panel=VIRTUAL,
    ),
]
Hours = Annotated[
    float | None,
    typer.Option(
        "--until",
        metavar="HOURS",
        min=0.0,
        help="Virtual time at which the replay ends (default: 30 days).",
        rich_help_panel=VIRTUAL,
    ),
]
Kept = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="NUMBER",
        min=1,
        help="Training processes that are kept at a time (default: 2). Each takes the memory of "
        "libraries and base; one for each device that trains saves starting them again.",
        rich_help_panel=VIRTUAL,
    ),
]


@app.command()
def demo(
    seed: Seed = 0,
    rule: Rule = "",
    rounds: Rounds = None,
    backend: WithBackend = None,
    broker: Broker = "",
    out: Out = Path("runs"),
    settings: Set = None,
    as_json: AsJson = False,
) -> None:
    """Run the demo: six recorded devices with six texts train one shared adapter.

    It takes minutes and leaves a report, its figures and the adapter in runs/latest.
    """
    run_fleet(None, seed, rule, rounds, backend, broker, out, settings, as_json)


@app.command()
def run(
    fleet: FleetFile = None,
    seed: Seed = 0,
    rule: Rule = "",
    rounds: Rounds = None,
    backend: WithBackend = None,
    broker: Broker = "",
    out: Out = Path("runs"),
    settings: Set = None,
    as_json: AsJson = False,
    devices: Devices = None,
    scenario: Scenario = "",
    fidelity: Fidelity = "",
    speed: Speed = "max",
    resolution: Resolution = 1.0,
    job_file: JobFile = None,
    policy: PolicyFile = None,
    data: Data = None,
    pool: PoolFolder = None,
    until: Hours = None,
    processes: Kept = None,
) -> None:
    """Run a fleet of your own: a file names its devices, their text, the base and the job.

    Or replay traces of devices, or a scenario, in virtual time: the options from --devices on are
    for that alone. Either leaves its figures and the adapter in runs/latest.
    """
    if scenario or (fleet is not None and fleet.suffix != ".toml"):
        from dataclasses import replace

        from device_profiles.fleet import for_rule
        from device_profiles.virtual.command import run_traces
        from device_profiles.virtual.options import Options as TraceOptions
        from device_profiles.virtual.options import parse_speed, read_fields

        if fleet is not None and scenario:
            raise typer.BadParameter("give traces or a --scenario, not both")
        if backend is not None:
            raise typer.BadParameter("virtual devices train with torch: leave --backend out")
        asked: dict[str, Any] = {"rule": rule} if rule else {}
        asked |= {"rounds": rounds} if rounds else {}
        job = read_fields(job_file, parse_settings(settings or []), asked)
        options = TraceOptions(
            traces=str(fleet or ""),
            scenario=scenario,
            devices=devices or 0,
            fidelity=fidelity,
            seed=seed,
            speed=parse_speed(speed),
            resolution_s=resolution,
            job=for_rule(job),
            policy=str(policy or ""),
            data=tuple(map(str, data or [])),
            pool=str(pool or ""),
            broker=broker,
        )
        options = options if until is None else replace(options, until_s=until * 3600)
        options = options if processes is None else replace(options, processes=processes)
        run_traces(options, out, as_json=as_json)
        return
    of_traces = [devices, job_file, policy, data, pool, until, processes, fidelity or None]
    if any(x is not None for x in of_traces) or (speed, resolution) != ("max", 1.0):
        raise typer.BadParameter(
            "--devices, --fidelity, --speed, --resolution, --job, --policy, --data, --pool, "
            "--processes and --until are for traces: name a trace, a folder of traces, or a "
            "--scenario"
        )
    run_fleet(fleet, seed, rule, rounds, backend, broker, out, settings, as_json)


@app.command()
def again(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Replay traces exactly as an earlier run did, from its log; say whether it came to the same.

    It ends with status 1 where it did not.
    """
    from device_profiles.virtual.command import run_again

    if not run_again(run_folder, out, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(metavar="RUN", help="Of another one.")],
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Where to draw them (default: in the second)."),
    ] = None,
) -> None:
    """Print two replays of traces side by side, and draw them in one HTML file."""
    from device_profiles.virtual.command import run_compare

    run_compare(one, other, picture)


def run_fleet(
    fleet: Path | None,
    seed: int,
    rule: str,
    rounds: int | None,
    backend: Backend | None,
    broker: str,
    out: Path,
    settings: list[str] | None,
    as_json: bool,
) -> None:
    """Run a fleet file, or the demo, with real processes in real time."""
    from dataclasses import replace

    from aggregator.probe_text import with_probe_text
    from device_profiles.fleet import (
        demo_fleet,
        for_rule,
        merge_settings,
        read_fleet,
        with_backend,
        with_demo_text,
        with_probe,
    )
    from device_profiles.replay import Options, check_replay, name_latest, replay, run_folder
    from device_profiles.watch import Watch

    job = with_probe_text(parse_settings(settings or []), Path(), "the command line")
    found = read_fleet(fleet) if fleet else demo_fleet()
    if rule:
        job["rule"] = rule
    if rounds:
        job["rounds"] = rounds
    model = str(job.pop("model", found.model))
    found = replace(found, model=model, job=for_rule(merge_settings(found.job, job)))
    if backend is not None:
        wanted: Any = "auto" if backend is Backend.mixed else backend.value
        found = with_backend(found, wanted)
    if not fleet and found.job.get("rule") == "trust-predictions":
        found = with_probe(found)
    where = f"{fleet} with the command line" if fleet else "the command line"
    check_replay(found, seed, broker, where)
    with run_folder(out) as folder:
        if not fleet:
            found = with_demo_text(found, folder / "text", seed=seed)
        options = Options(folder, seed=seed, broker=broker, mixed=backend is Backend.mixed)
        with Watch(as_json=as_json, live=sys.stdout.isatty()) as watch:
            summary = replay(found, options, watch.take)
    watch.finish(summary, name_latest(folder))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Read `a.b=value` settings; values are JSON, or text where they are not.

    Raises:
        FleetError: a setting has no `=`.
    """
    from device_profiles.errors import FleetError
    from device_profiles.fleet import merge_settings

    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise FleetError(f"--set {setting!r}: write name=value, say training.steps=20")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        found = merge_settings(found, value)
    return found


def main() -> None:
    """Run the command."""
    run_command(app)


if __name__ == "__main__":
    main()
