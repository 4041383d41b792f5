"""The `edge-client` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from edge_client import cli_models
from edge_client.cli_models import Backend, host_name
from edge_client.cli_record import record
from protocol.cli import run_command

app = typer.Typer(
    help="Fine-tune a shared model on this device's own text, which never leaves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def profile(
    profile_name: Annotated[
        str, typer.Argument(help="A recorded profile to show instead (name or .toml).")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    root: Annotated[
        Path | None, typer.Option(help="Read /proc, /sys and /dev as recorded under this folder.")
    ] = None,
) -> None:
    """Show what this device has: CPU, memory, heat, power, network, accelerators."""
    from device_profiles.schema import load_profile
    from edge_client.errors import ConfigError
    from edge_client.profile import measure_profile

    if root and (profile_name or not root.is_dir()):
        raise ConfigError(
            f"--root {root} is not a folder" if not profile_name else "name a profile or --root"
        )
    if root and not (root / "proc").is_dir():
        raise ConfigError(
            f"--root {root}: there is no proc/ in it; name the folder in which a device's /proc, "
            "/sys and /dev were recorded"
        )
    found = load_profile(profile_name) if profile_name else measure_profile(root or Path("/"))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    from edge_client.show import show_profile

    show_profile(found)


@app.command()
def plan(
    job: Annotated[
        Path | None, typer.Option(help="Job file to plan for (default: a job's defaults).")
    ] = None,
    model: Annotated[
        str, typer.Option(help="base-tiny, a model folder, or a hub id (default: the job's).")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Length of sequences (default: the job's).")] = 0,
    tokens_per_step: Annotated[
        int, typer.Option(help="Tokens of a training step (default: the job's).")
    ] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder of measured constants.")] = None,
    profile: Annotated[
        str, typer.Option(help="Plan as this recorded device (name or .toml).")
    ] = "",
    memory_cap_mib: Annotated[
        float | None, typer.Option("--memory-cap", help="MiB training may take in all.")
    ] = None,
    memory_scale: Annotated[
        float, typer.Option(help="Divide the model's part of the memory (for small bases).")
    ] = 1.0,
    threads: Annotated[int, typer.Option(help="Training threads (default: by measurement).")] = 0,
    private_rank: Annotated[
        int, typer.Option(help="Rank of a private adapter that never leaves (default: none).")
    ] = 0,
    train_blocks: Annotated[
        int, typer.Option(help="Train the last so many blocks alone, where the job lets you.")
    ] = 0,
    backend: Annotated[
        Backend, typer.Option(help="What to train with (auto: what fits best and is fastest).")
    ] = Backend.auto,
    onnx: Annotated[
        Path | None, typer.Option(help="Folder that `edge-client export-onnx` made.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="As for run.")] = None,
    explain: Annotated[bool, typer.Option(help="Show other plans, and why this one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every plan.")] = False,
) -> None:
    """Show how this device would train, measured here, without joining a fleet."""
    from device_profiles.schema import load_profile
    from edge_client.backends import check_backend
    from edge_client.calibrate import cache_folder
    from edge_client.config import Settings, check_cache
    from edge_client.membership import state_folder
    from edge_client.planned_job import planned_job
    from edge_client.policy.owner import find_policy
    from edge_client.profile import measure_profile
    from edge_client.show_plan import show_plan
    from protocol.transport import BrokerAddress

    check_backend(backend.value, onnx)
    given = {"max_tokens": max_tokens, "tokens_per_step": tokens_per_step}
    found = load_profile(profile) if profile else measure_profile()
    wanted, base = planned_job(job, model, {k: v for k, v in given.items() if v})
    settings = Settings(
        name="plan",
        broker=BrokerAddress("localhost", 1883),  # which nobody asks
        data=(),
        state=Path(),
        cache=check_cache(cache or cache_folder()),
        profile=found,
        model=base,
        memory_cap_mib=memory_cap_mib,
        memory_scale=memory_scale,
        threads=threads,
        private_rank=private_rank,
        train_blocks=train_blocks,
        backend=backend.value,
        onnx=onnx,
        policy=find_policy(state_folder("", host_name()), policy),
    )
    show_plan(settings, wanted, explain=explain, as_json=as_json)


@app.command()
def run(
    data: Annotated[
        list[Path], typer.Option(help="File or folder of text to learn from; may be repeated.")
    ],
    broker: Annotated[
        str,
        typer.Option(help="mqtt://host:port of the broker (default: as joined, or this computer)."),
    ] = "",
    name: Annotated[
        str, typer.Option(help="This device's name (default: as joined, or its host name).")
    ] = "",
    job: Annotated[str, typer.Option(help="Job (default: the only unfinished one).")] = "",
    model: Annotated[
        str, typer.Option(help="Folder of the base model, where the job's name is not found here.")
    ] = "",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of measured constants.")] = None,
    profile: Annotated[
        str, typer.Option(help="Plan as this recorded device (name or .toml).")
    ] = "",
    memory_cap_mib: Annotated[
        float | None, typer.Option("--memory-cap", help="MiB training may take in all.")
    ] = None,
    memory_scale: Annotated[
        float, typer.Option(help="Divide the model's part of the memory (for small bases).")
    ] = 1.0,
    threads: Annotated[
        int, typer.Option(help="Training threads (default: as many as measured to be worth it).")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the data's split and order.")] = 0,
    exit_when_done: Annotated[bool, typer.Option(help="End when the job is finished.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="End at once if the broker or the job is not there.")
    ] = False,
    compare_alone: Annotated[
        bool, typer.Option(help="At the end, train as much alone and report both.")
    ] = False,
    private_rank: Annotated[
        int, typer.Option(help="Rank of a private adapter that never leaves (default: none).")
    ] = 0,
    train_blocks: Annotated[
        int, typer.Option(help="Train the last so many blocks alone, where the job lets you.")
    ] = 0,
    backend: Annotated[
        Backend, typer.Option(help="What to train with (auto: what fits best and is fastest).")
    ] = Backend.auto,
    onnx: Annotated[
        Path | None, typer.Option(help="Folder that `edge-client export-onnx` made.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="When and how much to train (default: policy.toml in the state folder)."),
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints of a training under way.")
    ] = 300.0,
    system_root: Annotated[
        Path, typer.Option(help="Read power, heat and load below this folder.", hidden=True)
    ] = Path("/"),
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
) -> None:
    """Take part in a job: train on own text, publish deltas, receive what the fleet learned."""
    from edge_client.config import check_cache
    from edge_client.options import read_options
    from edge_client.taking_part import take_part

    settings = read_options(locals(), host_name())
    check_cache(settings.cache)
    take_part(settings, as_json=as_json)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are those of `edge-client run`.",
)
def install_service(
    context: typer.Context,
    system: Annotated[
        bool, typer.Option("--system/--user", help="A service of the system, or of this user.")
    ] = False,
    print_only: Annotated[bool, typer.Option("--print", help="Print the unit alone.")] = False,
) -> None:
    """Write a systemd unit that runs this device, and say how to start it."""
    from typer.main import get_command

    from edge_client.install import install, make_service, not_found_by
    from edge_client.options import read_options
    from edge_client.surroundings import surroundings
    from edge_client.unit import device_unit

    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    # By this command's name and not by `run`, for mistakes are told with it.
    with command.make_context(context.info_name, context.args, parent=context.parent) as parsed:
        given = [
            name
            for name in parsed.params
            if parsed.get_parameter_source(name).name == "COMMANDLINE"
        ]
    options = {parameter.name: parameter.opts[0] for parameter in command.params}
    settings = read_options(parsed.params, host_name())
    values = {name: parsed.params[name] for name in given}
    service, folder = make_service(
        settings, values, options, system=system, default_name=host_name()
    )
    if hidden := not_found_by(service, values):
        typer.echo(f"note: {hidden}", err=True)
    if print_only:
        typer.echo(device_unit(service), nl=False)
        if service.secrets:
            names = ", ".join(surroundings(os.environ)[1])
            typer.echo(f"note: put {names} into {service.secrets}, for you alone", err=True)
        return
    commands = install(service, folder)
    typer.echo("the unit is written; now:")
    for line in commands:
        typer.echo(f"  {line}")


@app.command()
def doctor(
    data: Annotated[
        list[Path] | None, typer.Option(help="File or folder of text, as for run.")
    ] = None,
    broker: Annotated[str, typer.Option(help="As for run.")] = "",
    name: Annotated[str, typer.Option(help="As for run.")] = "",
    model: Annotated[str, typer.Option(help="Count tokens as this model does.")] = "",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of measured constants.")] = None,
    policy: Annotated[Path | None, typer.Option(help="As for run.")] = None,
    memory_cap_mib: Annotated[
        float | None, typer.Option("--memory-cap", help="As for run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all that this device needs, and say what to do; exit status 1 if something fails."""
    from dataclasses import asdict

    from edge_client.calibrate import cache_folder
    from edge_client.doctor.broker import checks_at_broker
    from edge_client.doctor.find import find_patient
    from edge_client.doctor.here import checks_here

    patient = find_patient(
        name=name,
        host_name=host_name(),
        state=state,
        broker=broker,
        policy=policy,
        cache=cache or cache_folder(),
        data=tuple(data or ()),
        model=model,
        memory_cap_mib=memory_cap_mib,
    )
    checks = []
    for look in (checks_here, checks_at_broker):
        for check in look(patient):
            checks.append(check)
            if not as_json:
                typer.echo(str(check))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=1))
    raise typer.Exit(any(check.level == "fail" for check in checks))


@app.command()
def status(
    name: Annotated[str, typer.Option(help="This device's name, as for run.")] = "",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this device is at: job, round, plan, what it waits for, what today has cost."""
    from datetime import datetime

    from edge_client.condition import in_words, read_condition
    from edge_client.config import check_name
    from edge_client.membership import state_folder

    check_name(name or host_name())
    folder = state or state_folder(name, host_name())
    condition = read_condition(folder, datetime.now())
    if as_json:
        typer.echo(json.dumps(condition.as_dict(), indent=1))
    else:
        typer.echo("\n".join(in_words(condition)))


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="https://host:port of the fleet's enrolment.")],
    token: Annotated[
        str, typer.Option(help="What `aggregator enroll` printed.", envvar="TUNEFLEET_TOKEN")
    ],
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
) -> None:
    """Join a fleet with a token: its keys are made here and stay here."""
    from edge_client.config import default_state
    from edge_client.join import join as join_fleet

    folder = state or default_state(host_name())
    joined = join_fleet(url, token, folder)
    more = f" --state {quote(str(folder))}" if state else ""
    typer.echo(f"this device is {joined.device!r}; its broker is {joined.broker}")
    typer.echo(f"now: edge-client run --data FOLDER{more}")


for command in (*cli_models.COMMANDS, record):
    app.command()(command)


def main() -> None:
    """Run the command."""
    run_command(app)
