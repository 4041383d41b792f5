"""Which modules of the adapter a device trains: all of them, or those of the last blocks.

A backward pass through the last blocks alone keeps no activations of those below. Source: layers
chosen under a memory budget, Fed-piLot, arXiv 2410.10200, which rates their value too; ours are
always the last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from protocol.adapter import Adapter, Shapes
from protocol.errors import ProtocolError


def block_of(module: str) -> int:
    """Return the block that a module is in: the first number in its name, 0 where there is none."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), 0)


def block_count(shapes: Shapes) -> int:
    """Return how many blocks have modules."""
    return len({block_of(name) for name in shapes})


def last_blocks(shapes: Shapes, blocks: int) -> frozenset[str]:
    """Return the modules of the last `blocks` blocks; 0 stands for all of them."""
    last = sorted({block_of(name) for name in shapes})[-blocks:]
    return frozenset(name for name in shapes if block_of(name) in last)


def to_bitmap(shapes: Shapes, modules: Collection[str]) -> str:
    """Return some modules in hex digits, a bit each, in ascending order of all modules' names.

    The first module is the highest bit of the first digit; bits beyond the last are 0.
    """
    bits = "".join("1" if name in modules else "0" for name in sorted(shapes))
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def from_bitmap(shapes: Shapes, bitmap: str) -> frozenset[str]:
    """Return the modules that `to_bitmap` wrote.

    Raises:
        ProtocolError: it has not a bit for each module, a bit for none, or none is set.
    """
    names, digits = sorted(shapes), -(-len(shapes) // 4)
    if len(bitmap) != digits:
        raise ProtocolError(f"modules has {len(bitmap)} hex digits, {len(names)} take {digits}")
    bits = f"{int(bitmap, 16):0{4 * digits}b}"
    if "1" in bits[len(names) :] or "1" not in bits:
        raise ProtocolError(
            f"modules has no bit set, or one beyond the {len(names)} that there are"
        )
    return frozenset(name for name, bit in zip(names, bits, strict=False) if bit == "1")


def only(
    chosen: Mapping[str, npt.NDArray[np.intp]], modules: Collection[str]
) -> dict[str, npt.NDArray[np.intp]]:
    """Return the directions of some modules, and none of the others."""
    return {name: at if name in modules else at[:0] for name, at in chosen.items()}


def within(adapter: Adapter, modules: Collection[str]) -> Adapter:
    """Return an adapter that has rank 0 in all other modules."""
    layers = {n: f if n in modules else f.take(slice(0, 0)) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scale)


def beyond(adapter: Adapter, modules: Collection[str]) -> Adapter:
    """Return an adapter that has rank 0 in these modules."""
    return within(adapter, set(adapter.layers) - set(modules))
