"""A trainer for simulations, in which a process serves many devices and adapters change often.

Training is `TorchTrainer`'s own. Only loading differs: frozen factors are added into the base's
weights, W = W₀ + s·B·A, instead of running beside them, and PEFT's layers for the trained factors
stay and are filled anew. A device cannot do so, as it would round the factors to the base's bf16
or hold the base twice; in float32 the losses are the same to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_client.plan import Plan
from edge_client.trainer.torch_trainer import TRAINED, TorchTrainer
from protocol.adapter import Adapter


class FoldingTrainer(TorchTrainer):
    """Train and evaluate in float32, with what is frozen folded into the base."""

    def __init__(self, model_folder: Path, *, threads: int) -> None:
        super().__init__(model_folder, dtype="f32", threads=threads)
        modules = dict(self.model.named_modules())
        self._base: dict[str, Any] = {n: modules[n].weight for n in self.shapes}  # the parameters
        self._plain = {n: w.detach().clone() for n, w in self._base.items()}  # W₀

    @torch.no_grad()
    def load(self, trained: Adapter, frozen: Adapter | None, plan: Plan) -> None:
        """Take the adapter to train, and fold the frozen one into the base."""
        for name, weight in self._base.items():
            weight.copy_(self._plain[name])
            if frozen is not None:
                factors = frozen.layers[name]
                b, a = torch.from_numpy(factors.b).float(), torch.from_numpy(factors.a).float()
                weight.addmm_(b, a, alpha=frozen.scale)
        super().load(trained, None, plan)

    def _put(self, name: str, adapter: Adapter | None, dtype: torch.dtype) -> None:
        """Fill PEFT's layers anew if they are there; without an adapter they are not active."""
        if adapter is None or adapter.rank == 0:
            return
        filled = {n: f for n, f in adapter.layers.items() if f.rank}
        there = {n for n, layer in self._layers.items() if name in layer.lora_A}
        if name != TRAINED or there != set(filled):
            super()._put(name, adapter, dtype)
            return
        for module, factors in filled.items():
            layer = self._layers[module]
            layer.lora_A[name].weight.data = torch.tensor(factors.a, dtype=dtype)
            layer.lora_B[name].weight.data = torch.tensor(factors.b, dtype=dtype)
            layer.scaling[name] = adapter.scale
