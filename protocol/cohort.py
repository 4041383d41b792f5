"""Who takes part in a round: each device and the aggregator find the same, and no list is sent."""

from __future__ import annotations

import hashlib
from functools import lru_cache


def in_cohort(device: str, job: str, round_number: int, fraction: float) -> bool:
    """Say whether a device takes part in a round.

    The first 8 bytes of SHA-256 of "device|job|round|cohort", as a share of 2⁶⁴, are compared
    with the fraction: every device decides for itself and no list is sent.
    """
    return cohort_draw(device, job, round_number) < fraction * 2**64


@lru_cache(maxsize=1 << 14)
def cohort_draw(device: str, job: str, round_number: int) -> int:
    """Return a device's draw for a round, below 2⁶⁴; an aggregator asks for those of all."""
    digest = hashlib.sha256(f"{device}|{job}|{round_number}|cohort".encode()).digest()
    return int.from_bytes(digest[:8], "big")
