"""Which factors of an adapter a round trains: both, or A and B in turn."""

from __future__ import annotations

from typing import Literal

Factoring = Literal["both", "alternating"]
Trained = Literal["both", "A", "B"]


def trained_factors(factoring: Factoring, round_number: int) -> Trained:
    """Return what all devices train and send in a round, whichever attempt it is at.

    `alternating`: B in odd rounds, A in even ones, the other frozen. With one factor the same for
    everybody, Σp_k(B_kA) = (Σp_kB_k)A: an average of factors loses nothing. Round 1 trains B, for
    in version 1 it is zero, and A would have no gradient. Source: LoRA-A², arXiv 2410.22815; the
    identity also in RoLoRA, arXiv 2502.01755.
    """
    if factoring == "both":
        return "both"
    return "B" if round_number % 2 else "A"
