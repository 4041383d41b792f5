"""The commands of `edge-client` that are about models: describe, export, evaluate, chat."""

from __future__ import annotations

import json
import platform
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Backend(str, Enum):
    """What a device may be told to train or answer with."""

    auto = "auto"
    torch = "torch"
    onnx = "onnx"


class Form(str, Enum):
    """What `edge-client export` writes."""

    merged = "merged"
    onnx = "onnx"
    onnx_int8 = "onnx-int8"


def describe(
    model: Annotated[str, typer.Argument(help="base-tiny, a model folder, or a hub id.")],
) -> None:
    """Describe a base model for a job (JSON): its hash, size and target modules."""
    from edge_client.model import describe_model

    typer.echo(describe_model(model).model_dump_json(indent=1))


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


def export(
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder for it; it is made (default: in the state folder)."),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="For transformers, or for ONNX Runtime.")
    ] = Form.merged,
    adapter: Annotated[
        str,
        typer.Option(
            help="none, global, personal, mixed, or a PEFT folder (default: personal, else global)."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="Folder of the base model, where the adapter's is not found here.")
    ] = "",
    name: Annotated[str, typer.Option(help="This device's name, as for run.")] = "",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
) -> None:
    """Write the base model with what this device has learnt merged in (needs torch)."""
    from edge_client.backends import check_exporting
    from edge_client.errors import ConfigError
    from edge_client.exports.manifest import FOLDER
    from edge_client.kept import NONE, best_adapter, find_adapter
    from edge_client.membership import state_folder

    check_exporting(form.value)
    folder = state or state_folder(name, host_name())
    kept = find_adapter(adapter, folder) if adapter else best_adapter(folder)
    if kept.name == NONE and adapter != NONE:
        raise ConfigError(
            f"this device has no adapter yet: there is none in {folder}; say which device with "
            "--name or --state, give a PEFT folder with --adapter, or say --adapter none"
        )
    from edge_client.exports.write import write_export

    place = out or folder / FOLDER / f"{kept.name}-{form.value}"
    written = write_export(kept, model, place, form.value)
    merged = "no adapter" if written.adapter == NONE else f"adapter {written.adapter!r}"
    typer.echo(f"{written.base} with {merged}, {form.value}, is in {place}")


def chat(
    folder: Annotated[
        Path | None,
        typer.Argument(help="What edge-client export wrote (default: what fits, in the state)."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this alone (default: what is typed, or piped in).")
    ] = None,
    adapter: Annotated[
        str,
        typer.Option(
            help="none, global, personal, mixed, or a PEFT folder (default: personal, else global)."
        ),
    ] = "",
    backend: Annotated[
        Backend, typer.Option(help="What computes (auto: ONNX Runtime where there is an export).")
    ] = Backend.auto,
    provider: Annotated[
        str, typer.Option(help="ONNX Runtime's execution provider (default: by the profile).")
    ] = "",
    model: Annotated[
        str, typer.Option(help="Folder of the base model, where the adapter's is not found here.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="How freely words are chosen, to 100 (0: the likeliest).")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Share of the likeliest words to choose among, to 1.")
    ] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Choose alike each time.", min=0)] = None,
    threads: Annotated[
        int, typer.Option(help="Threads (default: one for each core).", min=0, max=1024)
    ] = 0,
    bench: Annotated[bool, typer.Option(help="Print speed and memory instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print --bench as JSON.")] = False,
    name: Annotated[str, typer.Option(help="This device's name, as for run.")] = "",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's state.")] = None,
) -> None:
    """Talk with the model as this device has learnt it."""
    from edge_client.chat.choose import Wish, choose
    from edge_client.chat.speaker import open_speaker
    from edge_client.config import most_threads
    from edge_client.errors import ConfigError
    from edge_client.membership import state_folder
    from edge_client.profile import measure_profile

    for option, value, most in (("--temperature", temperature, 100), ("--top-p", top_p, 1)):
        if not 0 <= value <= most:  # nor is "nan"
            raise ConfigError(f"{option} {value:g} is not a number from 0 to {most}")
    if as_json and not bench:
        raise ConfigError("--json goes with --bench: an answer is text")
    profile = measure_profile()
    threads = threads or most_threads(profile)
    wish = Wish(state or state_folder(name, host_name()), folder, adapter, backend.value, model)
    choice = choose(wish)
    speaker = open_speaker(choice, profile, provider=provider, threads=threads)
    for note in (choice.why, *speaker.notes, f"{choice.words}, on {speaker.runs_on}"):
        if note:
            print(note, file=sys.stderr)
    if bench:
        from edge_client.chat.bench import bench as measure

        found = measure(speaker, prompt, max_tokens, threads)
        typer.echo(json.dumps(found.as_dict()) if as_json else str(found))
        return
    from edge_client.chat.generate import chooser
    from edge_client.chat.talk import talk

    talk(speaker, prompt, chooser(temperature, top_p, seed), max_tokens)


def host_name() -> str:
    """Return the host's name as a device's name."""
    from edge_client.profile import slug

    return slug(platform.node() or "device")[:63].strip("-")


COMMANDS = (describe, export_onnx, evaluate, export, chat)
