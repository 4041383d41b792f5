"""What a device tells of its training in the metrics of an update, where its job asks for it.

    train_loss_before, train_loss_after    nats a token on the same training text
    tokens_0 … tokens_15                   how its training tokens fall in 16 buckets of a hash

A job asks by its `rule_settings.weights`. Sixteen buckets fit, with the losses, among the metrics
that an upload may have.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

LOSS_REDUCTION, DISCREPANCY = "loss-reduction", "discrepancy"
LOSS_BEFORE, LOSS_AFTER = "train_loss_before", "train_loss_after"
TOKEN_BUCKETS = tuple(f"tokens_{bucket}" for bucket in range(16))
LARGEST = float(1 << 40)


def asked_for(rule_settings: Mapping[str, object]) -> tuple[str, ...]:
    """Return the metrics that a job wants of every update."""
    wanted = {LOSS_REDUCTION: (LOSS_BEFORE, LOSS_AFTER), DISCREPANCY: TOKEN_BUCKETS}
    weights = rule_settings.get("weights")
    return wanted.get(weights, ()) if isinstance(weights, str) else ()


def wrong_metric(metrics: Mapping[str, float]) -> str:
    """Say which of these metrics no honest device sends; empty if there is none.

    Neither losses nor counts are negative, and sums of numbers up to `LARGEST` stay finite.
    """
    for name in (LOSS_BEFORE, LOSS_AFTER, *TOKEN_BUCKETS):
        if not 0 <= (value := metrics.get(name, 0.0)) <= LARGEST:
            return f"its metric {name} is {value:g}, not a number from 0 to {LARGEST:g}"
    return ""


def token_histogram(tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return how many tokens (any shape) fall in each bucket (16,): the top bits of a product.

    Multiplicative hashing by 2654435761, Knuth, The Art of Computer Programming, vol. 3, 6.4.
    """
    hashed = tokens.ravel().astype(np.uint32) * np.uint32(2654435761)
    return np.bincount(hashed >> np.uint32(28), minlength=len(TOKEN_BUCKETS))
