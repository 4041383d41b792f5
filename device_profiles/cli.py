"""The `fleet-replay` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from device_profiles.cli_options import (
    AsJson,
    Backend,
    Broker,
    Data,
    Devices,
    Fidelity,
    FleetFile,
    Hours,
    JobFile,
    Kept,
    OtherEngine,
    Out,
    PolicyFile,
    PoolFolder,
    Resolution,
    Rounds,
    Rule,
    Scenario,
    Seed,
    Set,
    Speed,
    WithBackend,
    WithEngine,
)
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
    engine: WithEngine = None,
) -> None:
    """Run a fleet of your own: a file names its devices, their text, the base and the job.

    Or replay traces of devices, or a scenario, in virtual time: the options from --devices on are
    for that alone. Either leaves its figures and the adapter in runs/latest.
    """
    if scenario or (fleet is not None and fleet.suffix != ".toml"):
        from dataclasses import replace

        from device_profiles.fleet import parse_settings
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
            job=_as_published(job),
            policy=str(policy or ""),
            data=tuple(map(str, data or [])),
            pool=str(pool or ""),
            broker=broker,
        )
        options = options if until is None else replace(options, until_s=until * 3600)
        options = options if processes is None else replace(options, processes=processes)
        options = options if engine is None else replace(options, engine=engine.value)
        run_traces(options, out, as_json=as_json)
        return
    of_traces = [devices, job_file, policy, data, pool, until, processes, engine, fidelity or None]
    if any(x is not None for x in of_traces) or (speed, resolution) != ("max", 1.0):
        raise typer.BadParameter(
            "--devices, --fidelity, --speed, --resolution, --job, --policy, --data, --pool, "
            "--processes, --engine and --until are for traces: name a trace, a folder of traces, "
            "or a --scenario"
        )
    run_fleet(fleet, seed, rule, rounds, backend, broker, out, settings, as_json)


@app.command()
def again(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Out = Path("runs"),
    as_json: AsJson = False,
    engine: OtherEngine = None,
) -> None:
    """Replay traces exactly as an earlier run did, from its log; say whether it came to the same.

    It ends with status 1 where it did not.
    """
    from device_profiles.virtual.command import run_again

    name: Any = engine.value if engine is not None else None
    if not run_again(run_folder, out, as_json=as_json, name=name):
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
        merge_settings,
        parse_settings,
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
    found = replace(found, model=model, job=_as_published(merge_settings(found.job, job)))
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


def _as_published(job: dict[str, Any]) -> dict[str, Any]:
    from device_profiles.fleet import for_rule

    whole, note = for_rule(job)
    if note:
        typer.echo(f"note: {note}", err=True)
    return whole


def main() -> None:
    """Run the command."""
    run_command(app)


if __name__ == "__main__":
    main()
