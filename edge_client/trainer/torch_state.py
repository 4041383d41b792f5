"""What a training under torch goes on from: factors, optimiser state and random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray


class TorchState:
    """Implement `edge_client.trainer.base.Resumable` for an optimiser of torch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters: list[torch.Tensor] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    def arrays(self) -> dict[str, NDArray[Any]]:
        found = {"random": torch.get_rng_state().numpy()}
        for index, parameter in enumerate(self._parameters):
            found[f"factor.{index}"] = parameter.detach().contiguous().numpy()
        for index, entries in self._optimizer.state_dict()["state"].items():
            for key, tensor in entries.items():
                found[f"state.{index}.{key}"] = tensor.contiguous().numpy()
        return found

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> bool:
        mine = {f"factor.{i}": tuple(p.shape) for i, p in enumerate(self._parameters)}
        if {n: a.shape for n, a in arrays.items() if n.startswith("factor.")} != mine:
            return False
        torch.set_rng_state(torch.tensor(arrays["random"]))
        state: dict[int, dict[str, Any]] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition(".")
            if kind == "factor":
                with torch.no_grad():
                    self._parameters[int(rest)].copy_(torch.tensor(array))
            elif kind == "state":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = torch.tensor(array)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        return True
