"""AdamW in numpy against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_client.trainer.adamw import ADAM_BETAS, AdamW, clip

SHAPES = {"x/a": (3, 5), "x/b": (7, 3), "y/a": (1, 4)}


def random(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (size * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_torchs(decay: float) -> None:
    ours = random(0)
    theirs = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in ours.items()}
    rates = {n: 0.01 if n.endswith("a") else 0.02 for n in SHAPES}
    groups = [{"params": [p], "lr": rates[n]} for n, p in theirs.items()]
    torch_optimiser = torch.optim.AdamW(groups, betas=ADAM_BETAS, weight_decay=decay)
    optimiser = AdamW(ours, weight_decay=decay)
    for step in range(25):
        gradients = random(step + 1, size=10.0 ** (step % 5 - 3))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        torch_optimiser.step()
        optimiser.step(gradients, rates)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1e3])
def test_clipping_is_torchs(norm: float) -> None:
    ours = random(3)
    theirs = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()]
    for parameter, gradient in zip(theirs, ours.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(theirs, norm)
    clip(ours, norm)
    for parameter, gradient in zip(theirs, ours.values(), strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-5)
