"""An exported graph with int8 weights: ONNX Runtime's dynamic quantisation, and the embedding too.

Every product with a weight computes in integers: a weight has a scale and a zero point for each
output, activations get theirs as they come. Weights are unsigned (u8 x u8): with signed ones the
instructions of x86 processors before VNNI overflow. The quantiser leaves the embedding as it is,
which in a small model is half of all weights. Here its rows are looked up in int8, in the output
head's own weight where they are tied, so that it is there once:

    head (d, V) int8, scale (V), zero (V);  x = scale[i]·(head[:, i] − zero[i])
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_client.exports.manifest import GRAPH
from edge_client.model import quiet

DATA = "model.onnx_data"
"""Weights lie beside the graph, so that ONNX Runtime maps them and does not read them twice."""
LEVELS = 255
SMALLEST = 1024
"""Tensors of fewer bytes stay in the graph."""


def quantise(source: Path, folder: Path) -> None:
    """Write the graph in the folder `source` with int8 weights into another, with all else.

    Raises:
        OSError: the folder can't be written.
    """
    whole = onnx.load(source / GRAPH)
    tied = _heads(whole)
    weights = {tensor.name for tensor in whole.graph.initializer}
    others = [
        n.name for n in whole.graph.node if n.op_type == "MatMul" and n.input[1] not in weights
    ]
    del whole
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as temporary:
        _quantise_products(source, Path(temporary), others)
        (made,) = Path(temporary).glob("*.onnx")
        model = onnx.load(made)
    _quantise_embeddings(model.graph, tied)
    _shorten_names(model.graph)
    onnx.save_model(
        model,
        folder / GRAPH,
        save_as_external_data=True,
        location=DATA,
        size_threshold=SMALLEST,
    )


def _quantise_products(source: Path, folder: Path, others: list[str]) -> None:
    """Quantise products with constants, by optimum's quantiser.

    `others` are products of attention, of activations with each other: it would take them too,
    which made perplexity 1.6 % worse.
    """
    with quiet("optimum"):
        from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    with quiet("optimum"):  # again: it sets how much it says when it is first imported
        scheme = AutoQuantizationConfig.avx2(
            is_static=False,
            per_channel=True,
            use_symmetric_weights=False,
            operators_to_quantize=["MatMul"],
            nodes_to_exclude=others,
        )
        ORTQuantizer.from_pretrained(source, file_name=GRAPH).quantize(
            save_dir=folder, quantization_config=scheme, use_external_data_format=True
        )


def _heads(model: Any) -> dict[str, str]:
    """Return of each embedding table that is also the weight of a product, transposed, that one."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [n.input[1] for n in model.graph.node if n.op_type == "MatMul"]
    return {
        table: other
        for table in _tables(model.graph)
        for other in products
        if other in weights
        and list(weights[other].dims) == list(weights[table].dims)[::-1]
        and np.array_equal(_array(weights[other]).T, _array(weights[table]))
    }


def _tables(graph: Any) -> list[str]:
    """Return the names of float tables that rows are looked up in."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    return [
        table
        for table in dict.fromkeys(n.input[0] for n in graph.node if n.op_type == "Gather")
        if table in weights
        and weights[table].data_type == TensorProto.FLOAT
        and len(weights[table].dims) == 2
    ]


def _array(tensor: Any) -> NDArray[Any]:
    found: NDArray[Any] = numpy_helper.to_array(tensor)
    return found


def _quantise_embeddings(graph: Any, tied: dict[str, str]) -> None:
    """Look rows up in int8 tables: in the head's weight that `tied` names, else in their own."""
    for table in _tables(graph):
        weight = next(tensor for tensor in graph.initializer if tensor.name == table)
        head = tied.get(table)
        if head is None:
            names = _add_table(graph, table, _array(weight))
        else:
            names = (f"{head}_quantized", f"{head}_scale", f"{head}_zero_point")
        nodes: list[Any] = []
        for node in graph.node:
            is_lookup = node.op_type == "Gather" and node.input[0] == table
            nodes += _lookup(node, names, head is not None) if is_lookup else [node]
        del graph.node[:]
        graph.node.extend(nodes)
        if not any(table in node.input for node in graph.node):
            graph.initializer.remove(weight)


def _add_table(graph: Any, table: str, values: NDArray[np.float32]) -> tuple[str, str, str]:
    """Add a table (V, d) in int8, with a scale and a zero point for each row."""
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)  # (V,)
    scale = np.maximum((high - low) / LEVELS, np.finfo(np.float32).tiny).astype(np.float32)
    zero = np.rint(-low / scale).astype(np.uint8)
    whole = np.clip(np.rint(values / scale[:, None]) + zero[:, None], 0, LEVELS).astype(np.uint8)
    names = (f"{table}_quantized", f"{table}_scale", f"{table}_zero_point")
    for name, array in zip(names, (whole, scale, zero), strict=True):
        graph.initializer.append(numpy_helper.from_array(array, name))
    return names


def _lookup(node: Any, names: tuple[str, str, str], transposed: bool) -> Iterator[Any]:
    """Yield nodes that look rows up in an int8 table (V, d), or (d, V) if it is transposed."""
    rows, scale, zero = names
    ids, out = node.input[1], node.output[0]

    def name(part: str) -> str:
        return f"{out}/{part}"

    if transposed:  # (d, V) → (d, batch, length) → (batch, length, d)
        yield helper.make_node("Gather", [rows, ids], [name("columns")], axis=1)
        yield helper.make_node("Transpose", [name("columns")], [name("rows")], perm=[1, 2, 0])
    else:
        yield helper.make_node("Gather", [rows, ids], [name("rows")], axis=0)
    last = numpy_helper.from_array(np.array([-1], np.int64))
    yield helper.make_node("Constant", [], [name("last")], value=last)
    for part, table in (("scale", scale), ("zero", zero)):
        yield helper.make_node("Gather", [table, ids], [name(f"{part}/flat")], axis=0)
        yield helper.make_node("Unsqueeze", [name(f"{part}/flat"), name("last")], [name(part)])
    for part in ("rows", "zero"):
        yield helper.make_node("Cast", [name(part)], [name(f"{part}/f32")], to=TensorProto.FLOAT)
    yield helper.make_node("Sub", [name("rows/f32"), name("zero/f32")], [name("centred")])
    yield helper.make_node("Mul", [name("centred"), name("scale")], [out])


def _shorten_names(graph: Any) -> None:
    """Call what is inside the graph by numbers: names are a quarter of a small model's file."""
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}

    def shortened(name: str) -> str:
        return name if name in fixed else short.setdefault(name, f"t{len(short):x}")

    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name = shortened(tensor.name)
    for node in graph.node:
        node.name = node.doc_string = ""
        for names in (node.input, node.output):
            names[:] = [shortened(name) for name in names]
