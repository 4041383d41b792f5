"""Adapters as files: export, export-onnx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aggregator.cli.options import DEFAULT_STATE, State


def export_onnx(
    model: Annotated[str, typer.Argument(help="base-tiny, a model folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact set; it is made.")],
) -> None:
    """Make what devices train a model from with ONNX Runtime, where torch is installed here."""
    from aggregator.edge import ask_edge

    said = ask_edge(
        "export-onnx",
        model,
        "--out",
        str(out),
        otherwise="exporting needs torch, which the aggregator does without: run "
        f"`edge-client export-onnx {model} --out {out}` on a computer that has it",
    )
    typer.echo(said, nl=False)


def export(
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to.")],
    state: State = None,
    version: Annotated[int | None, typer.Option(help="Version (default: the newest).")] = None,
    device: Annotated[
        str, typer.Option(help="The device whose own adapter it is to be, in a job that has such.")
    ] = "",
    push: Annotated[
        str,
        typer.Option(help="Copy it there too: a hub's id (owner/name), or any URL of fsspec's."),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write the shared adapter, or a device's own, as a directory for PeftModel.from_pretrained."""
    from dataclasses import asdict

    from aggregator.export import export_adapter
    from aggregator.push import push as push_to

    done = export_adapter(state or DEFAULT_STATE, out, version=version, device=device)
    pushed = push_to(out, push, message=f"Version {done.version}") if push else None
    if as_json:
        typer.echo(json.dumps(asdict(done) | ({"pushed": pushed} if pushed else {})))
        return
    size = f"rank {done.rank}, {done.parameters:,} parameters"
    typer.echo(f"version {done.version} is in {done.folder}: {size}")
    if pushed:
        typer.echo(f"it is at {pushed} too")
