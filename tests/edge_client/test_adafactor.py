"""Adafactor of the moment: in numpy and in torch the same, and as its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_client.trainer.adafactor import Adafactor, normalise
from edge_client.trainer.torch_adafactor import TorchAdafactor

SHAPES = {"x/a": (3, 5), "x/b": (7, 3), "y/a": (1, 4)}


def random(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (size * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_gradient_is_divided_by_the_size_of_its_rows_and_columns(size: float) -> None:
    for gradient in random(1, size).values():
        squares = gradient.astype(np.float64) ** 2
        rows, columns = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
        expected = gradient / np.sqrt(rows * columns / rows.mean())
        mine = gradient.copy()
        rms = normalise(mine)
        np.testing.assert_allclose(mine, expected, rtol=1e-5)
        assert rms == pytest.approx(max(1.0, np.sqrt((expected**2).mean())), rel=1e-5)


def test_what_has_no_gradient_stays_and_nothing_is_not_a_number() -> None:
    gradient = random(2)["x/a"]
    gradient[1] = 0
    normalise(gradient)
    assert np.isfinite(gradient).all() and not gradient[1].any()
    nothing = np.zeros((3, 4), np.float32)
    assert normalise(nothing) == 1.0 and not nothing.any()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch_moves_in_the_backward_pass_as_numpy_does_after_it(decay: float) -> None:
    ours = random(0)
    theirs = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in ours.items()}
    rates = {n: 0.01 if n.endswith("a") else 0.02 for n in SHAPES}
    optimizer = TorchAdafactor([{"params": [p], "lr": rates[n]} for n, p in theirs.items()])
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    numpy = Adafactor(ours, weight_decay=decay)
    for step in range(25):
        gradients = random(step + 1, size=10.0 ** (step % 5 - 3))
        optimizer.share = share = 1 / (1 + step % 3)
        with optimizer.moving(lambda _: None):
            loss = sum((p * torch.tensor(gradients[n])).sum() for n, p in theirs.items())
            assert isinstance(loss, torch.Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
        numpy.step(gradients, {n: share * rate for n, rate in rates.items()})
    for name, parameter in theirs.items():
        assert parameter.grad is None, "no gradient is kept"
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-6)
    assert optimizer.state_dict()["state"] == {}, "nor anything else"


def test_who_moves_no_more_gets_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = TorchAdafactor([{"params": [parameter]}])
    with optimizer.moving(lambda _: None):
        pass
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    assert parameter.grad is not None and bool((parameter == 1).all())


def test_it_goes_on_from_what_it_gave() -> None:
    rates = dict.fromkeys(SHAPES, 0.01)
    straight, again = random(0), random(5)
    kept = {n: v.copy() for n, v in Adafactor(straight, weight_decay=0.0).arrays().items()}
    other = Adafactor(again, weight_decay=0.0)
    assert other.restore(kept)
    Adafactor(straight, weight_decay=0.0).step(random(9), rates)
    other.step(random(9), rates)
    for name, value in straight.items():
        assert np.array_equal(value, again[name])
    assert not Adafactor({"x/a": again["x/a"]}, weight_decay=0.0).restore(kept)
