"""A weighted sum of low-rank products, held in as little memory as it takes.

It is held as the stack of all factors, or as the product where that is the smaller of the two.
Either is multiplied with a few vectors at a time, and never copied whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from protocol.adapter import Factors

Float64Array = npt.NDArray[np.float64]
Array = npt.NDArray[np.floating]

PART, EXACT = 128, 64
"""Rows that are summed at a time, and rows brought to float64."""
GATHERED = 1024
"""Columns that are gathered at a time at most."""


Source = Factors | Callable[[], Factors]
"""Factors, or what reads them: of a round in files one device's are in memory at a time."""


def read(source: Source) -> Factors:
    return source if isinstance(source, Factors) else source()


@dataclass(frozen=True, slots=True)
class Term:
    """Hold one contributor B·diag(weights)·A to a sum; `weights` (r,) carry its scale as well."""

    source: Source
    weights: Float64Array

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the numbers: who gets them can't read where they came from."""
        return Term, (self.read(), self.weights)

    @property
    def rank(self) -> int:
        return len(self.weights)

    def read(self) -> Factors:
        """Return the factors."""
        return read(self.source)


class Held(ABC):
    """Hold a sum, seen as G (m, n) with n ≤ m: the sum, or its transpose where it is wide.

    `size` is Σ_k max|w_k|·‖A_k‖_F·‖B_k‖_F of its terms, which bounds every sum on the way to the
    whole one. It is taken while they are read; infinite where float64's range is not enough.
    """

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        self.size = 0.0
        self.wide = shape[0] < shape[1]
        self.m, self.n = (shape[1], shape[0]) if self.wide else shape
        self.dtype = np.dtype(dtype)

    @abstractmethod
    def passed(self, v: Array) -> tuple[Array, Array]:
        """Return G·v (m, b) and GᵀG·v (n, b), in the type of `v` (n, b)."""

    @abstractmethod
    def lost(self, v: Array) -> float:
        """Return ‖G − G·v·vᵀ‖²_F for orthonormal columns v (n, r). The sum is used up by it."""


class Stack(Held):
    """Hold a sum as the factors `a` (N, d_in) and `b` (N, d_out) of all terms, weighted in `b`."""

    def __init__(self, terms: Sequence[Term], shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        super().__init__(shape, dtype)
        rank = sum(term.rank for term in terms)
        self.a, self.b = np.empty((rank, shape[1]), dtype), np.empty((rank, shape[0]), dtype)
        at = 0
        for term in terms:
            mine, factors = slice(at, at := at + term.rank), term.read()
            self.a[mine] = factors.a
            np.multiply(factors.b.T, term.weights[:, None].astype(dtype), out=self.b[mine])
            self.size += _size(factors, term.weights)
        self._left, self._right = (self.a, self.b) if self.wide else (self.b, self.a)

    def passed(self, v: Array) -> tuple[Array, Array]:
        forth = self._across(self._left, self._right, v)
        return forth, self._across(self._right, self._left, forth)

    def lost(self, v: Array) -> float:
        """See `Held.lost`: ‖leftᵀ·P‖² = tr((left·leftᵀ)(P·Pᵀ)), with P = right − right·v·vᵀ."""
        v = v.astype(self._right.dtype)
        for part in _parts(len(self._right)):
            self._right[part] -= (self._right[part] @ v) @ v.T
        squared = 0.0
        for part in _parts(len(self._right)):
            rest = slice(part.stop, None)
            left, right = self._left[part], self._right[part]
            squared += _inner(left @ left.T, right @ right.T)
            squared += 2 * _inner(left @ self._left[rest].T, right @ self._right[rest].T)
        return max(squared, 0.0)

    def _across(self, to: Array, of: Array, v: Array) -> Array:
        """Return toᵀ·of·v. In another type than the stack's a part of it at a time is copied."""
        if v.dtype == self.dtype:
            return np.asarray(to.T @ (of @ v))
        inner = np.empty((len(of), v.shape[1]), v.dtype)
        for part in _parts(len(of), EXACT):
            inner[part] = of[part].astype(v.dtype) @ v
        result = np.empty((to.shape[1], v.shape[1]), v.dtype)
        for part in _parts(len(result), EXACT):
            result[part] = to[:, part].astype(v.dtype).T @ inner
        return result


class Dense(Held):
    """Hold a sum as the product itself.

    Summed in parts of rows: a GEMM of a device alone is bound by the memory of the sum, and one
    of the whole sum needs as much again.
    """

    def __init__(self, terms: Sequence[Term], shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        super().__init__(shape, dtype)
        total = np.zeros(shape, dtype)
        # More rows at a time are faster; of many terms they are little beside what those take.
        stacked = sum(term.rank for term in terms) * sum(shape)
        rows = PART * min(4, max(1, stacked // (4 * total.size)))
        for a, b, size in _gathered(terms, shape, self.dtype):
            self.size += size
            for part in _parts(len(total), rows):
                total[part] += b[part] @ a
        self.total = total

    def passed(self, v: Array) -> tuple[Array, Array]:
        g = self.total.T if self.wide else self.total
        if v.dtype == g.dtype:
            forth = g @ v
            return forth, g.T @ forth
        forth, back = np.zeros((self.m, v.shape[1]), v.dtype), np.zeros_like(v)
        for part in _parts(self.m, EXACT):
            rows = g[part].astype(v.dtype)
            forth[part] = rows @ v
            for some in _parts(self.n, 4 * PART):
                back[some] += rows[:, some].T @ forth[part]
        return forth, back

    def lost(self, v: Array) -> float:
        g = self.total.T if self.wide else self.total
        v, squared = v.astype(g.dtype), 0.0
        for part in _parts(self.m, EXACT):
            rest = (g[part] @ v) @ v.T
            rest -= g[part]
            squared += _inner(rest, rest)
        return squared


def hold(terms: Sequence[Term], shape: tuple[int, int], dtype: npt.DTypeLike) -> Held:
    """Hold a sum of products (d_out, d_in) in the form that takes less memory."""
    stacked = sum(term.rank for term in terms) * sum(shape)
    return (Stack if stacked < shape[0] * shape[1] else Dense)(terms, shape, dtype)


def half(terms: Sequence[Term], side: Literal["a", "b"]) -> Array:
    """Return A (N, d_in), or Bᵀ (N, d_out), of all terms, without weights, in their widest type."""
    rank, at = sum(term.rank for term in terms), 0
    rows: Array = np.empty((0, 0), np.float32)
    for term in terms:
        factors = term.read()
        own = factors.a if side == "a" else factors.b.T
        if at == 0:
            rows = np.empty((rank, own.shape[1]), np.result_type(rows, own))
        elif np.result_type(rows, own) != rows.dtype:
            wider = np.empty(rows.shape, own.dtype)
            wider[:at] = rows[:at]  # the rest has no numbers yet
            rows = wider
        rows[at : (at := at + term.rank)] = own
        del factors, own  # or two devices' would be in memory at a time
    return rows


def norm_of(terms: Sequence[Term], shape: tuple[int, int]) -> float:
    """Return ‖Σ terms‖_F, in float64."""
    held = hold(terms, shape, np.float64)
    return float(np.sqrt(held.lost(np.zeros((held.n, 0)))))


def _size(factors: Factors, weights: Float64Array) -> float:
    """Return max|w|·‖A‖_F·‖B‖_F of a term: see `Held`."""
    lengths = [float(np.abs(weights).max(initial=0.0)), _length(factors.a), _length(factors.b)]
    return math.prod(lengths) if all(lengths) else 0.0


def _length(values: Array) -> float:
    """Return ‖values‖_F, in their type if its range is enough for the squares."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squared = float(np.vdot(values, values))
        if not 1e-30 < squared < math.inf:
            exact = values.astype(np.float64).ravel()
            squared = float(exact @ exact)
    return math.sqrt(squared)


def _gathered(
    terms: Sequence[Term], shape: tuple[int, int], dtype: np.dtype[Any]
) -> Iterator[tuple[Array, Array, float]]:
    """Yield stacks A (N, d_in), B·diag(weights) (d_out, N) of a few terms, and the size of these.

    They lie in the same memory each time, a sixth of what all of them would take at most.
    """
    ranks = [term.rank for term in terms]
    width = max(min(GATHERED, sum(ranks) // 6), *ranks, 1)
    a, b = np.empty((width, shape[1]), dtype), np.empty((shape[0], width), dtype)
    filled, size = 0, 0.0
    for i, term in enumerate(terms):
        mine, factors = slice(filled, filled := filled + term.rank), term.read()
        a[mine] = factors.a
        np.multiply(factors.b, term.weights.astype(dtype), out=b[:, mine])
        size += _size(factors, term.weights)
        if i == len(terms) - 1 or filled + ranks[i + 1] > width:
            yield a[:filled], b[:, :filled], size
            filled, size = 0, 0.0


def _parts(size: int, length: int = PART) -> Iterator[slice]:
    return (slice(at, min(at + length, size)) for at in range(0, size, length))


def _inner(one: Array, other: Array) -> float:
    """Return Σ one·other: a row in the type they have, the sum of rows in float64."""
    return float(np.einsum("ij,ij->i", one, other).sum(dtype=np.float64))
