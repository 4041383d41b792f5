"""The `edge-client` command."""

from __future__ import annotations

import json
import platform
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from protocol.cli import run_command


class Backend(str, Enum):
    """What `edge-client run` may be told to train with."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


app = typer.Typer(
    help="Fine-tune a shared model on this device's own text, which never leaves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def profile(
    profile_name: Annotated[
        str, typer.Argument(help="A recorded profile to show instead (name or .toml).")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this device has: CPU, memory, accelerators."""
    from device_profiles.schema import load_profile
    from edge_client.profile import measure_profile

    found = load_profile(profile_name) if profile_name else measure_profile()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    from edge_client.show import show_profile

    show_profile(found)


@app.command()
def describe(
    model: Annotated[str, typer.Argument(help="base-tiny, a model folder, or a hub id.")],
) -> None:
    """Describe a base model for a job (JSON): its hash, size and target modules."""
    from edge_client.model import describe_model

    typer.echo(describe_model(model).model_dump_json(indent=1))


@app.command("export-onnx")
def export_onnx(
    model: Annotated[str, typer.Argument(help="base-tiny, a model folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact set; it is made.")],
) -> None:
    """Make what devices train a model from with ONNX Runtime (needs torch; they do not)."""
    from edge_client.backends import check_export

    check_export()
    from edge_client.ort.export import export_artifact

    artifact = export_artifact(model, out)
    typer.echo(f"{artifact.name} for training with ONNX Runtime, of any rank, is in {out}")
    typer.echo(f"copy that folder to devices, and there: edge-client run --onnx {out.name} ...")


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
    explain: Annotated[bool, typer.Option(help="Show other plans, and why this one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every plan.")] = False,
) -> None:
    """Show how this device would train, measured here, without joining a fleet."""
    from device_profiles.schema import load_profile
    from edge_client.backends import check_backend
    from edge_client.calibrate import cache_folder
    from edge_client.config import Settings, check_cache
    from edge_client.planned_job import planned_job
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
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON Lines.")] = False,
) -> None:
    """Take part in a job: train on own text, publish deltas, receive what the fleet learned."""
    from device_profiles.schema import load_profile
    from edge_client.agent import Agent
    from edge_client.backends import check_backend
    from edge_client.calibrate import cache_folder
    from edge_client.config import Settings, check_cache, check_name
    from edge_client.data.read import check_paths
    from edge_client.membership import identity, state_folder
    from edge_client.profile import measure_profile
    from protocol.events import EventLog
    from protocol.files import lock_folder

    check_name(name or _host_name())
    folder = state or state_folder(name, _host_name())
    device, address, tls = identity(folder, name=name, broker=broker, default_name=_host_name())
    found = load_profile(profile) if profile else measure_profile()
    check_paths(data)  # found out later only after minutes of measuring
    check_backend(backend.value, onnx)
    settings = Settings(
        name=device,
        broker=address,
        tls=tls,
        data=tuple(data),
        state=folder,
        cache=check_cache(cache or cache_folder()),
        profile=found,
        job=job,
        model=model,
        memory_cap_mib=memory_cap_mib,
        memory_scale=memory_scale,
        threads=threads,
        seed=seed,
        exit_when_done=exit_when_done,
        compare_alone=compare_alone,
        private_rank=private_rank,
        train_blocks=train_blocks,
        backend=backend.value,
        onnx=onnx,
        wait_for_broker=not no_wait,
    )
    with lock_folder(settings.state, "edge-client"):
        events = EventLog(as_json=as_json, device=device)
        while Agent(settings, events).run():
            pass  # that job is finished: wait for another


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

    folder = state or default_state(_host_name())
    joined = join_fleet(url, token, folder)
    more = f" --state {quote(str(folder))}" if state else ""
    typer.echo(f"this device is {joined.device!r}; its broker is {joined.broker}")
    typer.echo(f"now: edge-client run --data FOLDER{more}")


@app.command()
def evaluate(
    data: Annotated[
        list[Path], typer.Option(help="File or folder of text; its held-out part is used.")
    ],
    model: Annotated[str, typer.Option(help="base-tiny, a model folder, or a hub id.")] = (
        "base-tiny"
    ),
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="PEFT directory of an adapter; may be repeated (default: none)."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the sequences.", min=2)] = 256,
    max_rows: Annotated[
        int | None,
        typer.Option(help="At most so many sequences of each path (default: all).", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, as in training.", min=0)] = 0,
) -> None:
    """Print held-out losses through PEFT, nats a token, as JSON: adapter (or base), data, loss."""
    from edge_client.backends import require_torch

    require_torch()
    from edge_client.evaluate import evaluate_peft

    adapters = ["base", *(str(path) for path in adapter or [])]
    losses = evaluate_peft(
        model, [None, *(adapter or [])], data, max_tokens=max_tokens, seed=seed, max_rows=max_rows
    )
    table = {
        name: {str(path): loss for path, loss in row.items()}
        for name, row in zip(adapters, losses, strict=True)
    }
    typer.echo(json.dumps(table))


def _host_name() -> str:
    """Return the host's name as a device's name."""
    from edge_client.profile import slug

    return slug(platform.node() or "device")[:63].strip("-")


def main() -> None:
    """Run the command."""
    run_command(app)
