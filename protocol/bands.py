"""Rank bands: the slices of a shared adapter that a device downloads as its rank and link allow.

A job's ladder, say (2, 4, 8), cuts the directions of the shared adapter into the disjoint bands
[0, 2), [2, 4), [4, 8). The first r rows of A and columns of B are the rank-r adapter, so a device
of rank r needs the bands below r and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from protocol.adapter import Adapter, Factors, Shapes, module_rank, parameter_count
from protocol.errors import ProtocolError


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
    first, dash, last = name.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ProtocolError(f"{name!r} is not a rank band (say '4-8')")
    return Band(int(first), int(last))


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


def band_shapes(shapes: Shapes, band: Band) -> dict[str, tuple[int, int]]:
    """Return the tensor names and shapes that a band's file must have, no more and no fewer."""
    return factor_shapes(
        shapes,
        {n: module_rank(s, band.stop) - module_rank(s, band.start) for n, s in shapes.items()},
    )


def factor_shapes(shapes: Shapes, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return tensor names (as PEFT writes them) and shapes of an adapter with these ranks.

    A module of rank 0 has no tensors.
    """
    expected = {}
    for name, (d_out, d_in) in shapes.items():
        if ranks[name]:
            expected[tensor_name(name, "A")] = (ranks[name], d_in)
            expected[tensor_name(name, "B")] = (d_out, ranks[name])
    return expected


def tensor_name(module: str, factor: str) -> str:
    """Return PEFT's name of a factor: the canonical key on the wire and in files."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def to_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return an adapter as named tensors; modules of rank 0 are left out."""
    tensors = {}
    for name, factors in adapter.layers.items():
        if factors.rank:
            tensors[tensor_name(name, "A")] = factors.a
            tensors[tensor_name(name, "B")] = factors.b
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], shapes: Shapes, scale: float) -> Adapter:
    """Return the adapter of named tensors; a module with no tensors has rank 0."""
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        a = tensors.get(tensor_name(name, "A"), np.zeros((0, d_in), np.float32))
        b = tensors.get(tensor_name(name, "B"), np.zeros((d_out, 0), np.float32))
        layers[name] = Factors(a, b)
    return Adapter(layers, scale)
