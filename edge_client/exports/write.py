"""Write an export: the base with an adapter merged in, in the form that was asked for."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_client.data.plain_tokenizer import tokenizer_fields
from edge_client.errors import ModelError
from edge_client.exports.manifest import GRAPH, MANIFEST, Export, Kind
from edge_client.exports.merge import write_merged
from edge_client.kept import Kept, find_base
from edge_client.model import BASE_TINY, model_hash, model_name
from edge_client.whole import put_whole
from protocol.artifact import sha256_of

LIBRARIES = ("tunefleet", "torch", "transformers", "peft", "optimum-onnx", "onnx")


def write_export(kept: Kept, model: str, out: Path, kind: Kind) -> Export:
    """Write an adapter's base with the adapter merged in; what an earlier export left is replaced.

    It is made beside `out` and put there when it is whole.

    Raises:
        ConfigError: nobody said which base; or `out` holds something else than an export.
        ModelError: the base or the adapter can't be loaded, don't fit each other, or can't be
            exported in this form.
        StorageError: it can't be written.
    """
    base = find_base(kept, model)
    with put_whole(out, "an export", lambda folder: (folder / MANIFEST).is_file(), "OUT") as whole:
        export = _write(kept, model or kept.base, base, whole, kind)
        (whole / MANIFEST).write_text(export.model_dump_json(indent=1))
    return export


def _write(kept: Kept, model: str, base: Path, whole: Path, kind: Kind) -> Export:
    """Write all files but the manifest into `whole`, and return that."""
    merged = whole if kind == "merged" else whole.with_name("merged")
    written = write_merged(base, kept.folder, merged)
    if kind != "merged":
        if not written.tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer in {base} has no form for the tokenizers library, which chats "
                "without torch; export it with --format merged"
            )
        _write_onnx(merged, whole, kind)
    return Export(
        kind=kind,
        base=BASE_TINY if BASE_TINY in (model, kept.folder and kept.base) else model_name(model),
        base_sha256=model_hash(base),
        adapter=kept.name,
        adapter_sha256=kept.sha256,
        **tokenizer_fields(written.tokenizer),
        stop_tokens=written.stop_tokens,
        context_tokens=written.context_tokens,
        versions={library: found for library in LIBRARIES if (found := _version(library))},
        files={path.name: sha256_of(path) for path in sorted(whole.iterdir())},
    )


def _write_onnx(merged: Path, whole: Path, kind: Kind) -> None:
    from edge_client.exports.graph import write_graph

    if kind == "onnx":
        write_graph(merged, whole, tie=True)
        return
    from edge_client.exports.quantise import quantise

    graph = merged.with_name("graph")
    write_graph(merged, graph, tie=False)
    for path in graph.iterdir():
        if not path.name.startswith(GRAPH):
            shutil.copy(path, whole)
    quantise(graph, whole)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
