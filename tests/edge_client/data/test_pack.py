"""Check the laws of packing and of the stream: nothing lost, nothing split, exact resumption."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data.pack import (
    Batch,
    BatchStream,
    PackedRow,
    StreamState,
    block_causal_mask,
    evaluation_batches,
    pack,
    packing_efficiency,
)
from edge_client.data.tokenize import IGNORED, TokenSequence
from edge_client.errors import DataError

SEQ_LEN = 16


def sequence(first: int, length: int) -> TokenSequence:
    """Return tokens that count up from `first`, each position's target the next."""
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    return TokenSequence(ids, labels)


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Return sequences of these lengths that share no token."""
    return [sequence(100 * i, length) for i, length in enumerate(lengths)]


def unpacked(rows: list[PackedRow]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of every segment."""
    found = []
    for row in rows:
        for segment in range(1, row.segments.max() + 1):
            part = row.segments == segment
            assert row.positions[part].tolist() == list(range(part.sum()))
            found.append((row.ids[part].tolist(), row.labels[part].tolist()))
    return found


def as_lists(batch: Batch) -> list[object]:
    """Return a batch as lists that compare."""
    return [batch.ids.tolist(), batch.labels.tolist(), batch.positions.tolist()]


lengths_of_sequences = st.lists(st.integers(2, SEQ_LEN), max_size=60)


@given(lengths=lengths_of_sequences, seed=st.integers(0, 2**40))
def test_packing_keeps_every_sequence_whole_and_once(lengths: list[int], seed: int) -> None:
    sequences = sequences_of(lengths)
    rows = pack(sequences, SEQ_LEN, seed=seed)
    whole = [(s.ids.tolist(), s.labels.tolist()) for s in sequences]
    assert sorted(unpacked(rows)) == sorted(whole)
    for row in rows:
        filler = row.segments == 0
        assert len(row.ids) == len(row.labels) == len(row.positions) == SEQ_LEN
        assert (row.labels[filler] == IGNORED).all() and (row.positions[filler] == 0).all()
        assert not filler[: SEQ_LEN - filler.sum()].any()


@given(lengths=lengths_of_sequences, seed=st.integers(0, 99))
def test_packing_opens_a_row_only_when_none_has_room(lengths: list[int], seed: int) -> None:
    rows = pack(sequences_of(lengths), SEQ_LEN, seed=seed)
    fills = sorted(int(np.count_nonzero(row.segments)) for row in rows)
    assert sum(fills[:2]) > SEQ_LEN or len(fills) < 2  # not even the emptiest two fit in one


def test_packing_is_decided_by_the_seed() -> None:
    sequences = sequences_of([5, 6, 7, 8, 9, 10] * 10)
    one, same, other = (unpacked(pack(sequences, SEQ_LEN, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_efficiency_of_many_short_texts_is_high() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 5000).tolist()
    rows = pack(sequences_of(lengths), 256, seed=0)
    assert packing_efficiency(rows) > 0.99
    assert packing_efficiency(rows) == pytest.approx(sum(lengths) / (256 * len(rows)))
    assert packing_efficiency([]) == 0.0


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens in rows of 16"):
        pack(sequences_of([SEQ_LEN + 1]), SEQ_LEN, seed=0)


def test_the_mask_follows_the_rule() -> None:
    segments = np.array([[1, 1, 2, 2, 0, 0]])
    seen = [[i, j] for i, j in np.argwhere(block_causal_mask(segments)[0]).tolist() if i != j]
    assert seen == [[1, 0], [3, 2]]
    assert block_causal_mask(segments)[0].diagonal().all()


@given(segments=st.lists(st.integers(0, 3), min_size=1, max_size=10))
def test_the_mask_is_the_rule_position_by_position(segments: list[int]) -> None:
    mask = block_causal_mask(np.array([segments]))[0]
    for i, own in enumerate(segments):
        for j, theirs in enumerate(segments):
            assert mask[i, j] == (i == j if own == 0 else j <= i and own == theirs)


def rows_of(count: int) -> list[PackedRow]:
    """Return rows of one sequence each, whose first token tells them apart."""
    return [pack([sequence(100 * i, SEQ_LEN)], SEQ_LEN, seed=0)[0] for i in range(count)]


@given(count=st.integers(1, 9), micro_batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_each_epoch_of_the_stream_has_each_row_once(
    count: int, micro_batch: int, seed: int
) -> None:
    stream = BatchStream(rows_of(count), micro_batch, seed)
    batches = list(islice(stream, 3 * count))  # that is 3 * micro_batch epochs
    assert all(batch.ids.shape == (micro_batch, SEQ_LEN) for batch in batches)
    drawn = [int(first) for batch in batches for first in batch.ids[:, 0]]
    for epoch in range(3 * micro_batch):
        part = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(part) == [100 * i for i in range(count)]
    assert stream.epoch == 3 * micro_batch


@given(
    count=st.integers(1, 9),
    before=st.integers(0, 12),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**40),
)
def test_a_resumed_stream_equals_one_that_was_not_interrupted(
    count: int, before: int, sizes: tuple[int, int], seed: int
) -> None:
    rows = rows_of(count)
    first = BatchStream(rows, sizes[0], seed)
    for _ in range(before):
        next(first)
    state: StreamState = json.loads(json.dumps(first.state()))
    resumed = BatchStream.from_state(rows, sizes[0], state)
    assert [as_lists(next(resumed)) for _ in range(8)] == [as_lists(next(first)) for _ in range(8)]
    # Another micro-batch goes on with the same rows.
    smaller, again = BatchStream.from_state(rows, sizes[1], state), BatchStream(rows, 1, seed)
    for _ in range(before * sizes[0]):
        next(again)
    expected = [next(again).ids[0].tolist() for _ in range(sizes[1])]
    assert next(smaller).ids.tolist() == expected


def test_epochs_are_shuffled_by_the_seed() -> None:
    rows = rows_of(30)

    def order(seed: int) -> list[int]:
        return [int(batch.ids[0, 0]) for batch in islice(BatchStream(rows, 1, seed), 60)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:30] != order(1)[30:]


def test_a_state_of_other_rows_is_refused() -> None:
    state = BatchStream(rows_of(3), 1, 0).state()
    with pytest.raises(DataError, match="anew"):
        BatchStream.from_state(rows_of(4), 1, state)
    with pytest.raises(DataError, match="no row"):
        BatchStream([], 1, 0)
    with pytest.raises(ValueError, match="at least 1 row"):
        BatchStream(rows_of(1), 0, 0)


@given(lengths=lengths_of_sequences, micro_batch=st.integers(1, 5))
def test_evaluation_has_every_target_once(lengths: list[int], micro_batch: int) -> None:
    sequences = sequences_of(lengths)
    rows = pack(sequences, SEQ_LEN, seed=1)
    batches = list(evaluation_batches(rows, micro_batch))
    assert sum(len(batch.ids) for batch in batches) == len(rows)
    assert all(len(batch.ids) == micro_batch for batch in batches[:-1])
    assert sum(batch.tokens for batch in batches) == sum(length - 1 for length in lengths)
    targets = Counter(int(x) for b in batches for x in b.labels[b.labels != IGNORED])
    assert targets == Counter(int(x) for s in sequences for x in s.labels[:-1])
    assert all(batch.ids.dtype == np.int64 for batch in batches)
