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


def test_it_goes_on_from_what_it_gave_as_if_it_never_stopped() -> None:
    rates = dict.fromkeys(SHAPES, 0.01)
    straight = random(0)
    optimiser = AdamW(straight, weight_decay=0.1)
    for step in range(3):
        optimiser.step(random(step + 1), rates)
    kept = {name: array.copy() for name, array in optimiser.arrays().items()}
    optimiser.step(random(9), rates)
    again = random(5)
    other = AdamW(again, weight_decay=0.1)
    assert other.restore(kept)
    other.step(random(9), rates)
    for name, value in straight.items():
        assert np.array_equal(value, again[name])
    cut = AdamW({"x/a": again["x/a"]}, weight_decay=0.1)
    assert not cut.restore(kept)  # of another adapter


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
