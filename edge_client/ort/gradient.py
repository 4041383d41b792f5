"""From a forward graph to the training graph: gradients of the factors, and the loss in chunks.

ONNX Runtime differentiates the forward graph with respect to its trained factors. The output head
is frozen, so the gradient with respect to the hidden states is known as soon as logits are: a loop
over chunks of positions computes loss and gradient, and no more than one chunk of logits exists
(as in edge_client.trainer.loss). Its result takes the place of the forward graph's `UPSTREAM`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import SessionOptions
from onnxruntime.capi import _pybind_state as runtime
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from edge_client.ort.artifact import gradient_name
from edge_client.ort.forward import HIDDEN, PSEUDO, UPSTREAM
from edge_client.ort.runtime import ERRORS

CHUNK_TOKENS = 64
IR_VERSION = 10
"""The newest that ONNX Runtime 1.19 reads."""


def build_training_graph(
    forward: onnx.ModelProto, trained: Sequence[str], head: str, width: int
) -> onnx.ModelProto:
    """Return the training graph: the forward graph's inputs, and `labels` (B, S), negative: none.

    Outputs are the summed `loss` in nats, `hidden` (B·S, d) and a gradient of each trained factor.
    `head` is the input that holds the output head's weight (V, d); `width` is d.
    """
    options = SessionOptions()
    options.log_severity_level = ERRORS
    optimised = onnx.load_from_string(
        runtime.get_optimized_model(forward.SerializeToString(), set(trained), options)
    )
    _multiply_by_transposed(optimised)
    _infer_shapes(optimised)
    builder = runtime.GradientGraphBuilder(
        optimised.SerializeToString(), {PSEUDO}, set(trained), PSEUDO, options
    )
    builder.build()
    model = onnx.load_from_string(builder.get_model())
    _add_loss(model, head, width)
    outputs = {value.name: value for value in model.graph.output}
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    model.graph.output.append(outputs[HIDDEN])
    model.graph.output.extend(outputs[gradient_name(name)] for name in trained)
    model.ir_version = min(model.ir_version, IR_VERSION)
    return model


def _multiply_by_transposed(model: onnx.ModelProto) -> None:
    """Let products with a transposed input, a weight or factor, read it as it lies.

    Transposed it would lie in memory twice, as ONNX Runtime works constants out beforehand.
    """
    inputs = {value.name for value in model.graph.input}
    transposed = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose"
        and node.input[0] in inputs
        and list(node.attribute[0].ints) == [1, 0]
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposed:
            node.op_type = "Gemm"
            node.input[1] = transposed[node.input[1]].input[0]
            node.attribute.append(helper.make_attribute("transB", 1))
    used = {name for node in model.graph.node for name in node.input}
    kept = [n for n in model.graph.node if n.output[0] not in transposed or n.output[0] in used]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _infer_shapes(model: onnx.ModelProto) -> None:
    """Write the shape of everything into a graph, in its free dims.

    Where the gradient's builder can't see that two shapes are one it sums over what might have been
    broadcast. What inference does not know is given to it as the operator that it stands for.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type == "ConcatTraining":
            node.op_type, node.domain = "Concat", ""
            del node.output[1:]
    inferred = SymbolicShapeInference.infer_shapes(plain, auto_merge=True)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)


def _add_loss(model: onnx.ModelProto, head: str, width: int) -> None:
    """Put the chunked loss behind the hidden states (n, width), in place of `UPSTREAM`."""
    graph = model.graph
    inputs = [value for value in graph.input if value.name != UPSTREAM]
    labels = helper.make_tensor_value_info("labels", TensorProto.INT64, ["B", "S"])
    at = 1 + next(i for i, node in enumerate(graph.node) if HIDDEN in node.output)
    nodes = [*graph.node[:at], *_loss_nodes(width, head), *graph.node[at:]]
    nodes = [node for node in nodes if PSEUDO not in node.output]
    del graph.input[:], graph.node[:]
    graph.input.extend([*inputs, labels])
    graph.node.extend(nodes)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    assert versions[""] <= 17, "Squeeze, Pad and Reduce* below are of those operator sets"


def _loss_nodes(width: int, head: str) -> list[onnx.NodeProto]:
    """Return the nodes from HIDDEN and labels to UPSTREAM and loss; `width` is d."""

    def constant(name: str, value: object, dtype: type = np.int64) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.array(value, dtype), name)
        return helper.make_node("Constant", [], [f"loss/{name}"], value=tensor)

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(
            kind, [_local(i) for i in inputs.split()], [_local(output)], **attributes
        )

    def _local(name: str) -> str:
        return name if name in (HIDDEN, UPSTREAM, "labels", "loss") else f"loss/{name}"

    return [
        constant("zero", [0]),
        constant("chunk", [CHUNK_TOKENS]),
        constant("flat", [-1]),
        constant("none", -100),
        constant("start", 0.0, np.float32),
        constant("rows", [-1, CHUNK_TOKENS]),
        constant("chunks", [-1, CHUNK_TOKENS, width]),
        constant("tokens", [-1, width]),
        node("Reshape", "labels flat", "targets"),
        node("Shape", "targets", "count"),
        # The last chunk is filled up with positions that do not count.
        node("Neg", "count", "minus"),
        node("Mod", "minus chunk", "missing"),
        node("Concat", "zero missing", "filled", axis=0),
        node("Pad", "targets filled none", "targets_filled"),
        node("Concat", "zero zero missing zero", "filled_2d", axis=0),
        node("Pad", f"{HIDDEN} filled_2d", "hidden_filled"),
        node("Reshape", "targets_filled rows", "target_chunks"),
        node("Reshape", "hidden_filled chunks", "hidden_chunks"),
        helper.make_node(
            "Scan",
            ["loss/start", "loss/hidden_chunks", "loss/target_chunks"],
            ["loss", "loss/gradient_chunks"],
            body=_chunk_graph(width, head),
            num_scan_inputs=2,
        ),
        node("Reshape", "gradient_chunks tokens", "gradient_filled"),
        node("Slice", "gradient_filled zero count zero", UPSTREAM),
    ]


def _chunk_graph(width: int, head: str) -> onnx.GraphProto:
    """Return what happens to a chunk: its loss is added, its gradient with respect to h returned.

    loss = Σ (log Σ exp(logits) − logits[target]), gradient = softmax·W − W[target], both where a
    label counts. `head` is W (V, d), of the graph around.
    """
    node = helper.make_node
    info = helper.make_tensor_value_info
    one = numpy_helper.from_array(np.array([1], np.int64), "axis")
    nothing = numpy_helper.from_array(np.array(0, np.int64), "nothing")
    return helper.make_graph(
        [
            node("Gemm", ["h", head], ["logits"], transB=1),  # (chunk, V)
            node("ReduceLogSumExp", ["logits"], ["log_z"], axes=[1]),  # (chunk, 1)
            node("Sub", ["logits", "log_z"], ["log_p"]),
            node("Exp", ["log_p"], ["p"]),
            node("GreaterOrEqual", ["target", "nothing"], ["counts"]),
            node("Cast", ["counts"], ["counts_flat"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["counts_flat", "axis"], ["counted"]),  # (chunk, 1)
            node("Max", ["target", "nothing"], ["index"]),
            node("Gather", [head, "index"], ["picked_weight"]),  # (chunk, d)
            node("Mul", ["h", "picked_weight"], ["products"]),
            node("ReduceSum", ["products", "axis"], ["picked"]),  # (chunk, 1)
            node("Sub", ["log_z", "picked"], ["losses"]),
            node("Mul", ["losses", "counted"], ["counted_losses"]),
            node("ReduceSum", ["counted_losses"], ["chunk_loss"], keepdims=0),
            node("Add", ["total", "chunk_loss"], ["new_total"]),
            node("MatMul", ["p", head], ["expected_weight"]),
            node("Sub", ["expected_weight", "picked_weight"], ["rest"]),
            node("Mul", ["rest", "counted"], ["gradient"]),
        ],
        "chunk",
        [
            info("total", TensorProto.FLOAT, []),
            info("h", TensorProto.FLOAT, [CHUNK_TOKENS, width]),
            info("target", TensorProto.INT64, [CHUNK_TOKENS]),
        ],
        [
            info("new_total", TensorProto.FLOAT, []),
            info("gradient", TensorProto.FLOAT, [CHUNK_TOKENS, width]),
        ],
        [one, nothing],
    )
