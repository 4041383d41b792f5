"""Rank bands, the slices of a shared adapter that a device downloads, and how they travel.

A job's ladder, say (2, 4, 8), cuts the directions of the shared adapter into the disjoint bands
[0, 2), [2, 4), [4, 8). The first r rows of A and columns of B are the rank-r adapter, so a device
of rank r needs the bands below r and no more. On the wire equal factors of several modules are
stacked to one tensor, in bands as in uploads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protocol.adapter import Adapter, Factors, LazyLayers, Shapes, module_rank, parameter_count
from protocol.errors import ProtocolError
from protocol.factors import Trained
from protocol.tensors import Encoding, TensorFile, decode

# As in topics: other scripts' digits would name the same band twice.
_BAND = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")


class Band(NamedTuple):
    """Name the directions `start` ≤ h < `stop`."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Return the band's name in topics, say "4-8"."""
        return f"{self.start}-{self.stop}"


def parse_band(name: str) -> Band:
    """Read a band's name.

    Raises:
        ProtocolError: it is not two ascending numbers with a dash between them.
    """
    found = _BAND.fullmatch(name)
    if found is None or int(found[1]) >= int(found[2]):
        raise ProtocolError(f"{name!r} is not a rank band (say '4-8')")
    return Band(int(found[1]), int(found[2]))


def bands(ladder: Sequence[int]) -> list[Band]:
    """Return the bands of an ascending ladder of ranks."""
    return [Band(a, b) for a, b in zip([0, *ladder[:-1]], ladder, strict=True)]


def covering(ladder: Sequence[int], rank: int) -> list[Band]:
    """Return the bands that a device needs to hold the first `rank` directions."""
    return [band for band in bands(ladder) if band.start < rank]


def band_parameters(shapes: Shapes, band: Band) -> int:
    """Return how many numbers a band holds."""
    return parameter_count(shapes, band.stop) - parameter_count(shapes, band.start)


def affordable(
    shapes: Shapes, ladder: Sequence[int], *, rank: int, byte_budget: float, bytes_each: int
) -> list[Band]:
    """Return the bands a device downloads: those of its rank, and as many above as its link allows.

    `byte_budget` is what the link may carry for one version; the bands of the device's own rank
    are taken whatever they cost, for without them it can't take part.
    """
    taken: list[Band] = []
    spent = 0
    for band in bands(ladder):
        spent += band_parameters(shapes, band) * bytes_each
        if band.start >= rank and spent > byte_budget:
            break
        taken.append(band)
    return taken


def cut(adapter: Adapter, band: Band) -> Adapter:
    """Return a band of an adapter; a module with fewer directions gives what it has, maybe none."""
    part = slice(band.start, band.stop)
    return Adapter({n: f.take(part) for n, f in adapter.layers.items()}, adapter.scale)


def join(parts: Mapping[Band, Adapter], scale: float) -> Adapter:
    """Put contiguous bands together again, lowest first.

    Raises:
        ProtocolError: a band is missing between two others, or below them.
    """
    ordered = sorted(parts)
    expected = 0
    for band in ordered:
        if band.start != expected:
            raise ProtocolError(f"band {expected}-{band.start} is missing below {band.name}")
        expected = band.stop
    names: Iterable[str] = parts[ordered[0]].layers if ordered else ()
    return Adapter(
        {
            name: Factors(
                np.concatenate([parts[b].layers[name].a for b in ordered], axis=0),
                np.concatenate([parts[b].layers[name].b for b in ordered], axis=1),
            )
            for name in names
        },
        scale,
    )


def band_ranks(shapes: Shapes, band: Band) -> dict[str, int]:
    """Return how many directions of each module a band holds."""
    return {n: module_rank(s, band.stop) - module_rank(s, band.start) for n, s in shapes.items()}


class Stack(NamedTuple):
    """Name what travels as one tensor: a factor that has the same shape in several modules.

    A tensor of its own for each factor costs some 125 bytes of header, an eighth of a small
    model's rank-2 update; stacked, the header is a few hundred bytes.
    """

    factor: str
    """A or B."""
    rows: int
    columns: int
    modules: tuple[str, ...]
    """In ascending order of their names; the first axis of the tensor."""

    @property
    def name(self) -> str:
        """Return the tensor's name in a file, say "A.4x192"."""
        return f"{self.factor}.{self.rows}x{self.columns}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the tensor's shape (modules, rows, columns)."""
        return len(self.modules), self.rows, self.columns


def stacks(shapes: Shapes, ranks: Mapping[str, int], trained: Trained = "both") -> list[Stack]:
    """Return the tensors that an adapter with these ranks has on the wire, no more and no fewer.

    A module of rank 0 is in none. Where one factor was `trained`, the other does not travel.
    """
    members: dict[tuple[str, int, int], list[str]] = {}
    for module in sorted(shapes):
        (d_out, d_in), rank = shapes[module], ranks[module]
        if rank:
            members.setdefault(("A", rank, d_in), []).append(module)
            members.setdefault(("B", d_out, rank), []).append(module)
    return [
        Stack(*shape, tuple(modules))
        for shape, modules in members.items()
        if trained in ("both", shape[0])
    ]


def to_tensors(adapter: Adapter, trained: Trained = "both") -> dict[str, np.ndarray]:
    """Return an adapter as the tensors that travel; modules of rank 0 are left out."""
    layers = adapter.layers
    shapes = {name: (f.b.shape[0], f.a.shape[1]) for name, f in layers.items()}
    return {
        s.name: np.stack([layers[m].a if s.factor == "A" else layers[m].b for m in s.modules])
        for s in stacks(shapes, {name: f.rank for name, f in layers.items()}, trained)
    }


def read_adapter(
    data: bytes,
    shapes: Shapes,
    ranks: Mapping[str, int],
    scale: float,
    encoding: Encoding,
    trained: Trained = "both",
) -> Adapter:
    """Return the adapter in a file from a stranger, which has these ranks and nothing else.

    A factor that was not `trained`, and so is not in the file, is zero.

    Raises:
        BadTensors: the file is not that; says which tensor, and of which module.
    """
    expected = stacks(shapes, ranks, trained)
    tensors = decode(
        data,
        {s.name: s.shape for s in expected},
        encoding,
        parts={s.name: s.modules for s in expected},
    )
    found = {
        (module, s.factor): factor
        for s in expected
        for module, factor in zip(s.modules, tensors[s.name], strict=True)
    }
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        a = found.get((name, "A"), np.zeros((ranks[name], d_in), np.float32))
        b = found.get((name, "B"), np.zeros((d_out, ranks[name]), np.float32))
        layers[name] = Factors(a, b)
    return Adapter(layers, scale)


def stored_layers(
    path: Path,
    size: int,
    shapes: Shapes,
    ranks: Mapping[str, int],
    encoding: Encoding,
    trained: Trained = "both",
) -> LazyLayers:
    """Return what `read_adapter` has taken from the first `size` bytes of a file.

    The factors of a module are read when they are asked for.

    Raises:
        BadTensors: the file is not what it was.
        OSError: it can't be read; so when a module is.
    """
    expected = stacks(shapes, ranks, trained)
    file = TensorFile(path, size, {s.name: s.shape for s in expected}, encoding)
    places = {(m, s.factor): (s.name, i) for s in expected for i, m in enumerate(s.modules)}

    def read(module: str) -> Factors:
        (d_out, d_in), rank = shapes[module], ranks[module]
        a, b = places.get((module, "A")), places.get((module, "B"))
        return Factors(
            file.read(*a) if a else np.zeros((rank, d_in), np.float32),
            file.read(*b) if b else np.zeros((d_out, rank), np.float32),
        )

    return LazyLayers(tuple(shapes), read)
