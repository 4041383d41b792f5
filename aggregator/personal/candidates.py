"""Which adapters of a round all devices are given to try."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def draw(
    devices: Sequence[str], count: int, *, offered: Mapping[str, int], version: int, seed: int
) -> list[str]:
    """Return `count` of a round's devices: those whose last offer is longest ago.

    `offered` has the version with which each was offered last; among equals a hash of seed,
    version and device decides, so that it is a sample, and the same after a crash.
    """

    def order(device: str) -> tuple[int, bytes]:
        text = f"{seed}|{version}|{device}|candidate"
        return offered.get(device, 0), hashlib.sha256(text.encode()).digest()

    return sorted(sorted(devices, key=order)[:count])
