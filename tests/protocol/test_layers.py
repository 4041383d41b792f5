"""Which modules a device trains: counted from the last block, named in bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapter import initial_adapter
from protocol.errors import ProtocolError
from protocol.layers import (
    beyond,
    block_count,
    block_of,
    from_bitmap,
    last_blocks,
    only,
    to_bitmap,
    within,
)

SHAPES = {f"model.layers.{n}.{part}": (4, 3) for n in range(11) for part in ("q", "mlp.experts.7")}


def test_the_block_is_the_first_number_of_a_name_and_blocks_count_as_numbers() -> None:
    assert block_of("model.layers.3.mlp.experts.7") == 3
    assert block_of("transformer.h.10.attn.c_attn") == 10
    assert block_of("any") == 0
    assert block_count(SHAPES) == 11
    assert {block_of(name) for name in last_blocks(SHAPES, 2)} == {9, 10}
    assert last_blocks(SHAPES, 0) == last_blocks(SHAPES, 11) == frozenset(SHAPES)


def test_bits_go_in_the_order_of_the_names_bytes() -> None:
    shapes = {"l.2.q": (1, 1), "l.10.q": (1, 1), "l.1.q": (1, 1), "l.0.q": (1, 1), "l.3.q": (1, 1)}
    assert to_bitmap(shapes, {"l.0.q"}) == "80"
    assert to_bitmap(shapes, {"l.10.q"}) == "20"  # after l.1.q, before l.2.q
    assert to_bitmap(shapes, {"l.3.q"}) == "08"


@given(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
def test_a_bitmap_is_read_as_it_was_written(modules: set[str]) -> None:
    bitmap = to_bitmap(SHAPES, modules)
    assert len(bitmap) == 6
    assert from_bitmap(SHAPES, bitmap) == modules


@pytest.mark.parametrize(
    ("bitmap", "why"),
    [
        ("ffff", "4 hex digits, 22 take 6"),
        ("fffffff", "7 hex digits"),
        ("000000", "no bit set"),
        ("fffffe", "one beyond the 22"),
        ("000001", "one beyond the 22"),
    ],
)
def test_a_bitmap_of_another_model_is_refused(bitmap: str, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        from_bitmap(SHAPES, bitmap)


def test_what_is_not_trained_has_rank_0() -> None:
    whole = initial_adapter(SHAPES, 2, 1.0, 0)
    mine = last_blocks(SHAPES, 1)
    assert {n for n, f in within(whole, mine).layers.items() if f.rank} == mine
    assert {n for n, f in beyond(whole, mine).layers.items() if not f.rank} == mine
    every = {name: np.arange(2) for name in SHAPES}
    assert {n for n, at in only(every, mine).items() if len(at)} == mine
