"""Pack sequences into rows of one length, and hand the rows out as batches.

Several sequences share a row, so that next to nothing is padding. They must not see each other;
the block-causal rule, which every trainer follows, says so by the segments alone:

    position i may look at position j  iff  j ≤ i  and  segments[j] = segments[i] > 0,
    and filler (segment 0) looks at itself only, as a softmax over nothing is not a number.

Positions restart at 0 with each sequence. So a row's loss is that of its sequences by themselves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_client.data.tokenize import IGNORED, TokenSequence
from edge_client.errors import DataError
from protocol.metrics import token_histogram

FILLER_ID = 0
"""The token in filler; any that the model knows, for nothing looks at it."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Hold the sequences of one row; each array is (seq_len,) int32.

    `ids` are the tokens and `labels` their targets (-100: none), `positions` count from 0 in each
    sequence, `segments` number the sequences from 1; filler has segment 0 and label -100.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Hold a micro-batch of B rows of S tokens: the arrays of `PackedRow` as (B, S) int64."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Return how many labels count in the loss."""
        return int(np.count_nonzero(self.labels != IGNORED))


class StreamState(TypedDict):
    """Say where a stream stands; plain numbers, for a checkpoint in JSON."""

    seed: int
    drawn_rows: int
    fingerprint: int


def pack(sequences: Sequence[TokenSequence], seq_len: int, *, seed: int) -> list[PackedRow]:
    """Pack whole sequences into rows of exactly `seq_len` tokens, best fit first.

    Best-fit decreasing (Johnson et al., "Worst-case performance bounds for simple one-dimensional
    packing algorithms", SIAM J. Comput. 3, 1974): the longest sequence left goes into the row
    that it fills most. The seed shuffles sequences of equal length, and the rows.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    order = np.random.default_rng(seed)
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    if lengths.size and lengths.max() > seq_len:
        raise ValueError(f"a sequence of {lengths.max()} tokens in rows of {seq_len}")
    shuffled = order.permutation(len(sequences))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    # Rows by the room they have left, and that room as the bits of one number: the lowest bit
    # at or above a length is the best fit, found without a walk over the rows.
    open_rows: dict[int, list[int]] = {}
    rooms = 0
    for index in longest_first.tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        open_rows.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return [
        _fill_row([sequences[index] for index in rows[row]], seq_len)
        for row in order.permutation(len(rows)).tolist()
    ]


def _fill_row(sequences: Sequence[TokenSequence], seq_len: int) -> PackedRow:
    """Return the row of these sequences, one after the other, with filler after the last."""
    ids = np.full(seq_len, FILLER_ID, np.int32)
    labels = np.full(seq_len, IGNORED, np.int32)
    positions = np.zeros(seq_len, np.int32)
    segments = np.zeros(seq_len, np.int32)
    start = 0
    for number, sequence in enumerate(sequences, start=1):
        part = slice(start, start + len(sequence))
        ids[part] = sequence.ids
        labels[part] = sequence.labels
        positions[part] = np.arange(len(sequence))
        segments[part] = number
        start = part.stop
    return PackedRow(ids, labels, positions, segments)


def packing_efficiency(rows: Sequence[PackedRow]) -> float:
    """Return the share of all positions that hold a token and not filler; 0 without rows."""
    if not rows:
        return 0.0
    return float(np.mean([np.count_nonzero(row.segments) / len(row.segments) for row in rows]))


def label_histogram(rows: Iterable[PackedRow]) -> tuple[int, ...]:
    """Return how many labels fall in each bucket of `protocol.metrics.token_histogram`, (16,)."""
    counts = [token_histogram(row.labels[row.labels >= 0]) for row in rows]
    return tuple(np.sum(counts, axis=0).tolist())


def step_sample(rows: list[PackedRow], tokens_per_step: int) -> list[PackedRow]:
    """Return the rows on which a round's losses before and after it are compared.

    They are the first, about as many tokens as a step takes.
    """
    return rows[: max(1, tokens_per_step // len(rows[0].ids))] if rows else rows


def block_causal_mask(segments: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (B, S, S): whether position i (rows) may look at position j, from (B, S) segments."""
    length = segments.shape[-1]
    same = segments[:, :, None] == segments[:, None, :]  # (B, S, S)
    token = (segments > 0)[:, :, None]  # (B, S, 1)
    visible = same & token & np.tri(length, dtype=np.bool_)
    return np.asarray(visible | np.eye(length, dtype=np.bool_), np.bool_)


class BatchStream:
    """Hand out micro-batches of rows without end, reshuffled each epoch.

    The order of an epoch follows from the seed and its number alone. A batch that the epoch's
    last rows don't fill is completed from the next one, so each row comes once an epoch and
    every batch is full. What is drawn doesn't depend on the micro-batch: a smaller one
    (when memory ran short) goes on with the very next row. `drawn_rows` are behind it already:
    of whatever rows there were, so a stream of another text or length goes on from that many too.
    """

    def __init__(
        self, rows: Sequence[PackedRow], micro_batch: int, seed: int, *, drawn_rows: int = 0
    ) -> None:
        if not rows:
            raise DataError("there is no row to train on; give more text")
        if micro_batch < 1:
            raise ValueError(f"a micro-batch has at least 1 row, not {micro_batch}")
        self._rows = rows
        self._micro_batch = micro_batch
        self._seed = seed
        self._fingerprint = _fingerprint(rows)
        self._drawn = drawn_rows
        self._epoch = -1
        self._order: list[int] = []

    @classmethod
    def from_state(
        cls, rows: Sequence[PackedRow], micro_batch: int, state: StreamState
    ) -> BatchStream:
        """Return the stream that goes on where `state` was taken.

        Raises:
            DataError: the rows aren't those of the state.
        """
        stream = cls(rows, micro_batch, state["seed"], drawn_rows=state["drawn_rows"])
        if stream._fingerprint != state["fingerprint"]:
            raise DataError(
                "the text, the tokenizer or the sequence length is not what it was when training "
                "stopped, so it cannot go on from there; start this round's training anew"
            )
        return stream

    def state(self) -> StreamState:
        """Return where the stream stands, for `from_state`."""
        return {
            "seed": self._seed,
            "drawn_rows": self._drawn,
            "fingerprint": self._fingerprint,
        }

    @property
    def epoch(self) -> float:
        """Return how many times the rows were gone through, with the part of the current time."""
        return self._drawn / len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next full micro-batch."""
        return _batch([self._next_row() for _ in range(self._micro_batch)])

    def _next_row(self) -> PackedRow:
        epoch, index = divmod(self._drawn, len(self._rows))
        if epoch != self._epoch:
            shuffle = np.random.default_rng([self._seed, epoch])
            self._order = shuffle.permutation(len(self._rows)).tolist()
            self._epoch = epoch
        self._drawn += 1
        return self._rows[self._order[index]]


def evaluation_batches(rows: Sequence[PackedRow], micro_batch: int) -> Iterator[Batch]:
    """Yield each row once, in order; the last batch may be smaller."""
    for start in range(0, len(rows), micro_batch):
        yield _batch(rows[start : start + micro_batch])


def text_batches(
    ids: Sequence[int], *, window: int, seq_len: int, micro_batch: int
) -> Iterator[Batch]:
    """Yield a text to be predicted, cut into windows of `window` tokens that don't see each other.

    Rows hold them in order, and every batch has the shape of training, with filler: kernels for
    another shape would be made for it, and stay in memory.
    """
    windows = []
    for start in range(0, len(ids), window):
        part = np.asarray(ids[start : start + window], np.int32)
        windows.append(TokenSequence(part, np.full_like(part, IGNORED)))
    each = seq_len // window
    rows = [_fill_row(windows[i : i + each], seq_len) for i in range(0, len(windows), each)]
    rows += [_fill_row([], seq_len)] * (-len(rows) % micro_batch)
    return evaluation_batches(rows, micro_batch)


def _batch(rows: Sequence[PackedRow]) -> Batch:
    """Stack rows; int64, as torch and ONNX want of tokens and labels."""

    def stacked(name: str) -> NDArray[np.int64]:
        return np.stack([getattr(row, name) for row in rows]).astype(np.int64)

    return Batch(stacked("ids"), stacked("labels"), stacked("positions"), stacked("segments"))


def _fingerprint(rows: Sequence[PackedRow]) -> int:
    """Return a checksum of the rows' tokens and targets, in order."""
    checksum = 0
    for row in rows:
        checksum = zlib.crc32(row.labels.tobytes(), zlib.crc32(row.ids.tobytes(), checksum))
    return checksum
