"""The low-rank adapter that a fleet shares, in numpy.

Notation as in docs/algorithms.md: a target module with base weight W₀ (d_out, d_in) carries
`A` (r, d_in) and `B` (d_out, r) and adds s·B·A to it. The job fixes one scale `s` for the whole
fleet, so that cutting an adapter to another rank never changes what its columns mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Shapes = Mapping[str, tuple[int, int]]
"""Target module name → (d_out, d_in) of its base weight."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Hold the two factors of one module: `a` (r, d_in) and `b` (d_out, r)."""

    a: FloatArray
    b: FloatArray

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def take(self, directions: Sequence[int] | npt.NDArray[np.integer] | slice) -> Factors:
        """Return the factors of some directions: those rows of `a` and columns of `b`."""
        return Factors(self.a[directions], self.b[:, directions])


@dataclass(frozen=True, slots=True)
class LazyLayers(Mapping[str, Factors]):
    """Make the factors of a module whenever they are asked for, so that they take no memory.

    `make` raises KeyError for what is no module.
    """

    modules: tuple[str, ...]
    make: Callable[[str], Factors]

    def __getitem__(self, module: str) -> Factors:
        return self.make(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Hold the factors of every target module and the scale `s` of their products."""

    layers: Mapping[str, Factors]
    scale: float

    @property
    def rank(self) -> int:
        """Largest rank of any module; a module narrower than it has the rank it can have."""
        return max((f.rank for f in self.layers.values()), default=0)

    @property
    def is_zero(self) -> bool:
        """Whether every product is zero, so that the base is left as it is."""
        return not any(f.b.any() for f in self.layers.values())

    def truncated(self, rank: int) -> Adapter:
        """Return the first `rank` directions of each module."""
        return Adapter({n: f.take(slice(0, rank)) for n, f in self.layers.items()}, self.scale)


def module_rank(shape: tuple[int, int], rank: int) -> int:
    """Return the rank that a module of `shape` (d_out, d_in) has in an adapter of `rank`.

    A product B·A of a (d_out, d_in) module holds at most min(d_out, d_in) directions.
    """
    return min(rank, *shape)


def parameter_count(shapes: Shapes, rank: int) -> int:
    """Return how many numbers an adapter of `rank` has: Σ r·(d_in + d_out)."""
    return sum(module_rank(s, rank) * (s[0] + s[1]) for s in shapes.values())


def initial_adapter(shapes: Shapes, rank: int, scale: float, seed: int) -> Adapter:
    """Draw the adapter of version 0: rows of A orthonormal, B zero, so that its product is zero.

    Rows of A are orthonormal as they are after a product merge (see aggregator.merge.lowrank), so
    that a device meets the same step size in round 1 as later. The draw depends on the seed and
    the module's name alone.
    """
    layers = {}
    for name, shape in shapes.items():
        d_out, d_in = shape
        r = module_rank(shape, rank)
        digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        rows = np.linalg.qr(rng.standard_normal((d_in, r)))[0].T
        layers[name] = Factors(rows.astype(np.float32), np.zeros((d_out, r), np.float32))
    return Adapter(layers, scale)


def directions(
    mode: str, *, job: str, device: str, round_number: int, rank: int, held: int
) -> list[int]:
    """Return the directions of the shared adapter that a device trains, in ascending order.

    `top` takes the first `rank`. `rotating` takes `rank` of the `held` that the device has
    downloaded, drawn anew each round: those whose SHA-256 of "job|device|round|index" is
    smallest. Both sides compute it, in any language, so it need not travel; for a module with
    fewer than `held` directions, call it with that number as `held`.
    """
    rank = min(rank, held)
    if mode == "top":
        return list(range(rank))
    if mode != "rotating":
        raise ValueError(f"directions must be 'top' or 'rotating', not {mode!r}")
    draw = f"{job}|{device}|{round_number}|"
    ordered = sorted(range(held), key=lambda i: hashlib.sha256(f"{draw}{i}".encode()).digest())
    return sorted(ordered[:rank])


def module_directions(
    shapes: Shapes,
    mode: str,
    *,
    job: str,
    device: str,
    round_number: int,
    rank_trained: int,
    held: int,
    rank: int | None = None,
) -> dict[str, npt.NDArray[np.intp]]:
    """Return the directions that a device trains in each module, narrow modules included.

    `rank` is what the device cut itself to afterwards: it keeps the first of those it trained.
    """
    drawn: dict[int, npt.NDArray[np.intp]] = {}
    found = {}
    for name, shape in shapes.items():
        reach = module_rank(shape, held)
        if reach not in drawn:
            drawn[reach] = np.array(
                directions(
                    mode,
                    job=job,
                    device=device,
                    round_number=round_number,
                    rank=rank_trained,
                    held=reach,
                )[:rank],
                np.intp,
            )
        found[name] = drawn[reach]
    return found


def select(adapter: Adapter, chosen: Mapping[str, npt.NDArray[np.intp]]) -> Adapter:
    """Return some directions of each module of an adapter."""
    return Adapter({n: f.take(chosen[n]) for n, f in adapter.layers.items()}, adapter.scale)


def without(adapter: Adapter, chosen: Mapping[str, npt.NDArray[np.intp]]) -> Adapter:
    """Return the other directions of each module: the frozen remainder of what is trained."""
    return Adapter(
        {n: f.take(np.setdiff1d(np.arange(f.rank), chosen[n])) for n, f in adapter.layers.items()},
        adapter.scale,
    )


def difference(after: Adapter, before: Adapter) -> Adapter:
    """Return the change of each factor (not of the product): what an upload carries."""
    return _zip(after, before, np.subtract)


def add(before: Adapter, change: Adapter) -> Adapter:
    """Undo `difference`: return the factors after a change."""
    return _zip(before, change, np.add)


def _zip(one: Adapter, other: Adapter, operation: np.ufunc) -> Adapter:
    return Adapter(
        {
            n: Factors(operation(f.a, other.layers[n].a), operation(f.b, other.layers[n].b))
            for n, f in one.layers.items()
        },
        one.scale,
    )
