"""A trainer for simulations, in which a process serves many devices and adapters change often.

Training is `TorchTrainer`'s own. Only loading differs: frozen factors are added into the base's
weights, W = W₀ + s·B·A, instead of running beside them. A device cannot do so, as it would round
the factors to the base's bf16 or hold the base twice; in float32 the losses are the same to
rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_client.plan import Plan
from edge_client.trainer.torch_trainer import TorchTrainer
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
