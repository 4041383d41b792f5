"""How sharply a device's trust becomes weights: found by trial, not by hand.

Too sharp, and devices lose each other's help; too flat, and they drown in it. Each round a device
tries a neighbour of its temperature beside it, twice as high and half as high by turns, and the
better of the two on its trust split is the next one.

What does best at once is sharper than what is best to train on from: help that is given up is
missed in later rounds. So the flatter of two is better unless the sharper wins by `PATIENCE`; and
after the last round, when nobody trains on, a device is given one beside its own that is sharper
than its own and than the start, half of the lower of both, however flat devices trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aggregator.personal.settings import Strategy

START: dict[Strategy, float] = {
    "trust-weights": 0.1,
    "trust-validation": 0.4,
    "trust-predictions": 1.0,
}
"""In the units of a strategy's scores: a cosine, nats a token, a distance in parts of the mean."""
STEP = 2.0
PATIENCE = 0.01
"""Part of its loss by which a sharper temperature has to be better."""
FURTHEST = 10
"""Steps from the start."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """Hold a device's temperature as steps from the strategy's start, and where it looks next."""

    steps: int = 0
    direction: int = 1
    """−1 is sharper, 1 flatter."""

    def value(self, strategy: Strategy) -> float:
        return float(START[strategy] * STEP**self.steps)

    @property
    def trial(self) -> Temperature:
        """The neighbour that is tried beside this one."""
        return replace(self, steps=self.steps + self.direction)

    @property
    def last(self) -> Temperature:
        """The sharper one that is tried when nobody trains on."""
        return replace(self, steps=min(self.steps, 0) - 1)

    def after(self, received: float, trial: float) -> Temperature:
        """Return the next temperature, given the losses at this one and at its trial."""
        flatter, sharper = (trial, received) if self.direction > 0 else (received, trial)
        flatter_is_better = flatter <= (1 + PATIENCE) * sharper
        taken = flatter_is_better == (self.direction > 0)
        steps = self.trial.steps if taken else self.steps
        return Temperature(max(-FURTHEST, min(steps, FURTHEST)), -self.direction)
