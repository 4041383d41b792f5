"""How sharply a device's trust becomes weights: found by trial, not by hand.

Too sharp, and devices lose each other's help; too flat, and they drown in it. Each round a device
tries the neighbour of its temperature beside it, a factor of two up or down, and the better of the
two on its trust split is the next one. A trial that fails turns the direction of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aggregator.personal.settings import Strategy

START: dict[Strategy, float] = {
    "trust-weights": 0.1,
    "trust-validation": 0.1,
    "trust-predictions": 1.0,
}
"""In the units of a strategy's scores: a cosine, nats a token, a distance in parts of the mean."""
STEP = 2.0
FURTHEST = 10
"""Steps from the start."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """Hold a device's temperature as steps from the strategy's start, and where it looks next."""

    steps: int = 0
    direction: int = -1
    """−1 is sharper, 1 flatter."""

    def value(self, strategy: Strategy) -> float:
        return float(START[strategy] * STEP**self.steps)

    @property
    def trial(self) -> Temperature:
        """The neighbour that is tried beside this one."""
        return replace(self, steps=self.steps + self.direction)

    def after(self, received: float, trial: float) -> Temperature:
        """Return the next temperature, given the losses at this one and at its trial."""
        moved = self.trial if trial < received else replace(self, direction=-self.direction)
        if abs(moved.steps) >= FURTHEST:  # both ways are open only from inside
            return Temperature(moved.steps, -1 if moved.steps > 0 else 1)
        return moved
