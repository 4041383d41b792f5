"""Keep the samples of a trace as columns of numbers: thousands of traces fit in memory.

A column whose value never changes is kept once, and equal columns of many traces can be shared.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from device_profiles.traces.sample import FIELDS, POWER_SOURCES, Field, Sample, Value

UNKNOWN = -1
"""Of a flag, in a column of bytes."""
NAN = math.nan
NAMES = tuple(field.name for field in FIELDS)


class Samples(Sequence[Sample]):
    """Hold samples in ascending time; each is made anew where it is asked for."""

    __slots__ = ("_columns", "times")

    def __init__(self, times: array[float], columns: Sequence[array[Any]]) -> None:
        self.times = times
        self._columns = tuple(columns)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """Return samples as columns.

        Raises:
            ValueError: there is none, or times don't ascend.
        """
        rows = Rows()
        for sample in samples:
            rows.append(sample.t, [getattr(sample, field.name) for field in FIELDS])
        return rows.finish()

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        t = self.times[index]
        values = [
            _read(field, column[index] if len(column) > 1 else column[0])
            for field, column in zip(FIELDS, self._columns, strict=True)
        ]
        return Sample(t, *values)  # type: ignore[arg-type]  # in the order of its fields

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and self._bytes() == other._bytes()

    def __hash__(self) -> int:
        return hash(self._bytes())

    def index_at(self, t_s: float) -> int:
        """Return the index of the last sample at or before a time, 0 before the first."""
        return max(0, bisect_right(self.times, t_s) - 1)

    def change_after(self, t_s: float, field: str = "") -> float | None:
        """Return the time of the next sample after one within a trace; None: there is none.

        With a `field`, a flag, it is the next one where that has another value. The trace begins
        again at its last sample, so that holds for no time, and times may lie beyond it.
        """
        length = self.times[-1]
        if not length:
            return None
        if not field:
            return self.times[bisect_right(self.times, t_s)]
        column = self._columns[NAMES.index(field)]
        if len(column) == 1:
            return None
        index, count = self.index_at(t_s), len(column) - 1
        for following in range(index + 1, index + count):
            rounds, at = divmod(following, count)
            if column[at] != column[index]:
                return rounds * length + (self.times[at] if at else 0.0)
        return None

    def shared(self, known: dict[bytes, array[Any]]) -> Samples:
        """Return the same samples, made of columns that are `known` already where they are equal.

        `known` is by type and bytes, and is added to.
        """

        def share(column: array[Any]) -> array[Any]:
            return known.setdefault(column.typecode.encode() + column.tobytes(), column)

        return Samples(share(self.times), [share(column) for column in self._columns])

    def _bytes(self) -> tuple[bytes, ...]:
        return (self.times.tobytes(), *(column.tobytes() for column in self._columns))


class Rows:
    """Gather samples row by row."""

    def __init__(self) -> None:
        self._times: array[float] = array("d")
        self._columns = [_column(field) for field in FIELDS]

    def __len__(self) -> int:
        return len(self._times)

    @property
    def last_t(self) -> float | None:
        """Return the time of the newest row."""
        return self._times[-1] if self._times else None

    def append(self, t: float, values: Sequence[Value]) -> None:
        """Add a row: a time, and the values in the order of `FIELDS`.

        Raises:
            ValueError: it is not later than the row before.
        """
        if self._times and not t > self._times[-1]:
            raise ValueError(f"times ascend: {t:g} s comes after {self._times[-1]:g} s")
        self._times.append(t + 0.0)
        for field, column, value in zip(FIELDS, self._columns, values, strict=True):
            column.append(_written(field, value))

    def finish(self) -> Samples:
        """Return what was gathered.

        Raises:
            ValueError: it is nothing.
        """
        if not self._times:
            raise ValueError("a trace has at least one sample")
        return Samples(self._times, [_once(column) for column in self._columns])


def _column(field: Field) -> array[Any]:
    return array("d") if field.kind == "number" else array("b")


def _once(column: array[Any]) -> array[Any]:
    """Return a column whose values are all one as that one."""
    first = column[:1]
    return first if first.tobytes() * len(column) == column.tobytes() else column


def _written(field: Field, value: Value) -> float | int:
    if field.kind == "power":
        return POWER_SOURCES.index(value)
    if field.kind == "flag":
        return UNKNOWN if value is None else int(value)
    return NAN if value is None else float(value) + 0.0  # of -0.0, 0.0


def _read(field: Field, value: float) -> Value:
    if field.kind == "power":
        return POWER_SOURCES[int(value)]
    if field.kind == "flag":
        return None if value == UNKNOWN else bool(value)
    return None if math.isnan(value) else value
