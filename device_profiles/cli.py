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
        metavar="FLEET.toml", help="The fleet; docs/job.md has an example (default: the demo's)."
    ),
]
Out = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="Where runs are kept: each has a folder of its own in it."),
]
Seed = Annotated[
    int,
    typer.Option(metavar="NUMBER", help="Draws the demo's text, splits, order and directions."),
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
        help="How updates are merged: anchored, fedavg, hetlora, flexlora, segment, flora, "
        "trust-weights, trust-validation, trust-predictions, or an installed rule (default: what "
        "the fleet says, else anchored).",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER", min=1, help="Rounds of training (default: what the fleet says, else 6)."
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
    run(None, seed, rule, rounds, backend, broker, out, settings, as_json)


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
) -> None:
    """Run a fleet of your own: a file names its devices, their text, the base and the job.

    It leaves a report, its figures and the adapter in runs/latest.
    """
    from dataclasses import replace

    from aggregator.probe_text import with_probe_text
    from device_profiles.fleet import (
        demo_fleet,
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


def for_rule(job: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a published rule goes with, where the job does not say otherwise.

    Every merge rule but the anchored one was published for devices that cut the shared adapter to
    their own rank: the remainder dropped, the top directions trained, one learning rate for all.
    Trust strategies mix whole adapters.
    """
    from aggregator.personal import STRATEGIES
    from device_profiles.fleet import merge_settings

    if job.get("rule", "anchored") in ("anchored", *STRATEGIES):
        return job
    published = {
        "remainder": "dropped",
        "directions": "top",
        "training": {"learning_rate_by_rank": False},
    }
    return merge_settings(published, job)


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
