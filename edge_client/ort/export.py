"""Make an artifact set of a base model, on a computer with torch (edge-client export-onnx)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from safetensors.torch import save_file

from edge_client.data.plain_tokenizer import tokenizer_fields
from edge_client.errors import ModelError
from edge_client.model import (
    find_model,
    find_targets,
    load_model,
    load_tokenizer,
    model_hash,
    model_name,
)
from edge_client.ort.artifact import FACTORS, TRAINED, factor_name, read_artifact, weight_entries
from edge_client.ort.forward import OPSET, trace_forward
from edge_client.ort.gradient import build_training_graph
from edge_client.whole import put_whole
from protocol.adapter import Shapes
from protocol.artifact import (
    ALL_FILES,
    FILES,
    GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Artifact,
    sha256_of,
)

LIBRARIES = ("tunefleet", "torch", "transformers", "onnx", "onnxruntime-training-cpu")


def export_artifact(name: str, folder: Path) -> Artifact:
    """Write the artifact set of a model into a folder, which is made; an earlier set is replaced.

    Raises:
        ConfigError: the folder holds something else than an artifact set.
        ModelError: the model can't be found, loaded or exported.
        StorageError: the folder can't be written.
    """
    base = find_model(name)
    base_sha256 = model_hash(base)
    tokenizer = _plain_tokenizer(base)
    with put_whole(folder, "an artifact set", _is_set, "--out") as whole:
        model = load_model(base, torch.float32)
        targets = find_targets(model)
        head = _write(model, targets, whole)
        tokenizer.backend_tokenizer.save(str(whole / TOKENIZER))
        artifact = Artifact(
            name=model_name(name),
            base_sha256=base_sha256,
            modules=targets,
            head=head,
            **tokenizer_fields(tokenizer),
            opset=OPSET,
            versions={library: version(library) for library in LIBRARIES},
            files={file: sha256_of(whole / file) for file in FILES},
        )
        (whole / MANIFEST).write_text(artifact.model_dump_json(indent=1))
    return artifact


def _is_set(folder: Path) -> bool:
    """Say whether a folder holds an artifact set and nothing else: it may be a base model too."""
    try:
        read_artifact(folder)
    except ModelError:
        return False
    return all(path.name in ALL_FILES for path in folder.iterdir())


def _write(model: Any, targets: Shapes, folder: Path) -> str:
    """Write the training graph and the weights; return the output head's name."""
    head, head_weight = _head(model)
    graph, values = trace_forward(model, targets)
    values.setdefault(head, head_weight)
    trained = [factor_name(TRAINED, n, f) for n in targets for f in FACTORS]
    training = build_training_graph(graph, trained, head, head_weight.shape[1])
    save_file({n: v.contiguous() for n, v in values.items()}, folder / WEIGHTS)
    _point_to_weights(training, folder / WEIGHTS)
    (folder / GRAPH).write_bytes(training.SerializeToString())
    return head


def _plain_tokenizer(base: Path) -> Any:
    tokenizer = load_tokenizer(base)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {base} has no form for the tokenizers library; train with "
            "--backend torch"
        )
    return tokenizer


def _head(model: Any) -> tuple[str, torch.Tensor]:
    """Return the output head's weight and a name for it: the embedding's where they are one."""
    weight = model.get_output_embeddings().weight
    named = model.base_model.named_parameters()
    tied = [name for name, value in named if value.data_ptr() == weight.data_ptr()]
    prefix = f"{model.base_model_prefix}."
    return (prefix + tied[0] if tied else "head.weight"), weight.detach()


def _point_to_weights(model: onnx.ModelProto, path: Path) -> None:
    """Turn the inputs that a file of weights holds into constants that lie there.

    ONNX Runtime maps the file, so weights take the memory that is touched, and once.
    """
    entries = weight_entries(path)
    inputs = [value for value in model.graph.input if value.name not in entries]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    kinds = {"F32": TensorProto.FLOAT, "BOOL": TensorProto.BOOL, "I64": TensorProto.INT64}
    for name, (entry, offset, length) in entries.items():
        tensor = TensorProto(
            name=name,
            data_type=kinds[entry["dtype"]],
            dims=entry["shape"],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in {"location": path.name, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
