"""Alternating factors on the wire: one factor a round, which both sides know by the number."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.bands import read_adapter, stacks, to_tensors
from protocol.errors import BadTensors
from protocol.factors import Trained, trained_factors
from protocol.tensors import Encoding, encode

SHAPES = {"l.0.q": (6, 5), "l.0.k": (2, 5), "l.1.q": (6, 5)}
RANKS = {"l.0.q": 4, "l.0.k": 2, "l.1.q": 0}
ONE_FACTOR: list[Trained] = ["A", "B"]


def drawn() -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter(
        {
            name: Factors(
                rng.standard_normal((RANKS[name], d_in)).astype(np.float32),
                rng.standard_normal((d_out, RANKS[name])).astype(np.float32),
            )
            for name, (d_out, d_in) in SHAPES.items()
        },
        2.0,
    )


def test_odd_rounds_train_b_and_even_ones_a() -> None:
    assert [trained_factors("alternating", n) for n in range(1, 5)] == ["B", "A", "B", "A"]
    assert {trained_factors("both", n) for n in range(1, 5)} == {"both"}


@pytest.mark.parametrize("factor", ONE_FACTOR)
@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8"])
def test_one_factor_travels_and_the_other_is_zero(factor: Trained, encoding: Encoding) -> None:
    sent = drawn()
    tensors = to_tensors(sent, factor)
    assert {name[0] for name in tensors} == {factor}
    assert [s.name for s in stacks(SHAPES, RANKS, factor)] == list(tensors)
    came = read_adapter(encode(tensors, encoding), SHAPES, RANKS, 2.0, encoding, factor)
    for name, factors in sent.layers.items():
        there, zero = came.layers[name].a, came.layers[name].b
        wanted = factors.a
        if factor == "B":
            there, zero, wanted = zero, there, factors.b
        np.testing.assert_allclose(there, wanted, atol=0.02)
        assert zero.shape == (factors.b if factor == "A" else factors.a).shape
        assert not zero.any()


@pytest.mark.parametrize("factor", ONE_FACTOR)
def test_a_file_with_the_other_factor_is_refused(factor: Trained) -> None:
    other: Trained = "A" if factor == "B" else "B"
    for wrong in (to_tensors(drawn()), to_tensors(drawn(), other)):
        with pytest.raises(BadTensors, match=f"tensor '{other}.*not part of this job"):
            read_adapter(encode(wrong, "f32"), SHAPES, RANKS, 2.0, "f32", factor)
