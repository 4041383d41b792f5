"""A base model with LoRA in every target module, as an ONNX graph of its forward pass.

The graph takes ids and positions (B, S), an additive mask (B, 1, S, S), and of each target module
four factors: A (r, d_in) and B (d_out, r) of what is trained, and the same of the frozen remainder,
of rank q. The base's weights are inputs too, without their values. It returns the hidden states
before the output head, (B·S, d), and `PSEUDO`, their sum weighted by `UPSTREAM` (B·S, d): what
UPSTREAM holds becomes the gradient with respect to the hidden states.

Modules work on flat tokens (B·S, d): products of two matrices have gradients that are such again.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_client.errors import ModelError
from edge_client.ort.artifact import FACTORS, FROZEN, TRAINED, factor_name

if TYPE_CHECKING:
    from protocol.adapter import Shapes

OPSET = 16
"""From 17 on a layer norm is one operator, of which ONNX Runtime has no gradient."""
HIDDEN, PSEUDO, UPSTREAM = "hidden", "pseudo", "upstream"
_TRACED_RANKS = {TRAINED: 13, FROZEN: 17}
_BATCH, _LENGTH = 2, 20
"""Sizes of the trace alone; the graph's are free."""
_BASE, _LORA = "base.", "lora."


class _Traced(nn.Module):
    """Compute hidden states and their weighted sum with LoRA in the targets of `base`."""

    def __init__(self, base: nn.Module, targets: Shapes) -> None:
        super().__init__()
        self.base = base
        self.lora = nn.ParameterDict()
        modules = dict(base.named_modules())
        for name, (d_out, d_in) in targets.items():
            pairs = []
            for part, rank in _TRACED_RANKS.items():
                a, b = torch.zeros(rank, d_in), torch.zeros(d_out, rank)
                for factor, value in zip(FACTORS, (a, b), strict=True):
                    key = _key(factor_name(part, name, factor))
                    self.lora[key] = nn.Parameter(value, requires_grad=part == TRAINED)
                    pairs.append(key)
            modules[name].forward = _adapted(modules[name], self.lora, pairs)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.base(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])
        return (hidden * upstream).sum(), hidden


def _adapted(module: nn.Module, lora: nn.ParameterDict, keys: list[str]) -> Any:
    """Return a forward of a linear module that adds both pairs of factors."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        if isinstance(module, Conv1D):
            y = torch.addmm(module.bias, flat, module.weight)
        else:
            y = nn.functional.linear(flat, module.weight, module.bias)  # type: ignore[arg-type]
        for a, b in (keys[:2], keys[2:]):
            y = y + (flat @ lora[a].T) @ lora[b].T
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return forward


def trace_forward(model: Any, targets: Shapes) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """Return the forward graph of a model, and the tensors of the base that are its inputs.

    The model's targets are changed: it is good for nothing else afterwards. Its own names are those
    of the tensors.

    Raises:
        ModelError: its output head does more than multiply, or it can't be traced.
    """
    _check_head(model)
    prefix = f"{model.base_model_prefix}."
    base = model.base_model
    model.set_attn_implementation("eager")
    traced = _Traced(base, {n.removeprefix(prefix): shape for n, shape in targets.items()})
    traced.train()
    graph = _export(traced, model.config.hidden_size)
    values: dict[str, torch.Tensor] = dict(base.named_parameters(remove_duplicate=False))
    values.update(base.named_buffers(remove_duplicate=False))
    renamed = {
        _LORA + _key(factor_name(part, name.removeprefix(prefix), factor)): factor_name(
            part, name, factor
        )
        for part in _TRACED_RANKS
        for name in targets
        for factor in FACTORS
    }
    renamed |= {_BASE + name: prefix + name for name in values}
    _rename(graph, renamed)
    for value in graph.graph.input:
        _free_rank(value)
    given = {value.name for value in graph.graph.input}
    used = {prefix + name: value.detach() for name, value in values.items()}
    return graph, {name: value for name, value in used.items() if name in given}


def _export(traced: _Traced, width: int) -> onnx.ModelProto:
    ids = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    positions = torch.arange(_LENGTH).repeat(_BATCH, 1)
    mask = torch.zeros(_BATCH, 1, _LENGTH, _LENGTH)
    upstream = torch.zeros(_BATCH * _LENGTH, width)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "forward.onnx"
            warnings.simplefilter("ignore")
            torch.onnx.export(
                traced,
                (ids, positions, mask, upstream),
                file,
                dynamo=False,
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.TRAINING,
                input_names=["ids", "positions", "mask", UPSTREAM],
                output_names=[PSEUDO, HIDDEN],
                dynamic_axes={
                    "ids": {0: "B", 1: "S"},
                    "positions": {0: "B", 1: "S"},
                    "mask": {0: "B", 2: "S", 3: "S"},
                    UPSTREAM: {0: "B*S"},
                },
            )
            return onnx.load(file)
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"this model can't be exported to ONNX: {why[0][:300]}") from None


@torch.no_grad()
def _check_head(model: Any) -> None:
    """Refuse a model whose logits are not just hidden states times a weight."""
    head = model.get_output_embeddings()
    plain = head is not None and getattr(head, "bias", None) is None
    if plain:
        ids = torch.arange(8)[None] % model.config.vocab_size
        ours = model.base_model(ids).last_hidden_state @ head.weight.T
        plain = torch.allclose(ours, model(ids).logits, atol=1e-2, rtol=1e-2)
    if not plain:
        raise ModelError(
            "this model's output head does more than multiply by a weight, which is not exported; "
            "train it with --backend torch"
        )


def _key(name: str) -> str:
    """Return a factor's name as a parameter's, in which a dot has a meaning."""
    return name.replace(".", "|")


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = names[name]


def _free_rank(value: onnx.ValueInfoProto) -> None:
    """Let a factor's rank be free, and its own: equal names of dims promise equal sizes."""
    part, _, rest = value.name.partition("/")
    if part in _TRACED_RANKS:
        module, _, factor = rest.rpartition("/")
        dim = value.type.tensor_type.shape.dim[FACTORS.index(factor)]
        dim.ClearField("dim_value")
        dim.dim_param = f"rank {part} {module}"
