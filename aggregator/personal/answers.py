"""What a device says of the adapters that it was given to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold losses of adapters on one device's trust split, in nats a token, all on the same text.

    `received` is that of the adapter the device was given (its own mixture, or the common one),
    `own` of its full adapter of the round before, None where it took no part in that, `trial` of
    the mixture at another temperature. `candidates` are by the device that trained them.
    """

    received: float
    own: float | None = None
    trial: float | None = None
    candidates: Mapping[str, float] = field(default_factory=dict)
