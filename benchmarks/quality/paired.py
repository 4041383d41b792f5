"""Compare two arms over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan, sqrt
from statistics import fmean, stdev

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """Hold a mean over `count` seeds and the half width of its 95 % t-interval; NaN with one."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        """Return it as "1.234 ± 0.012"; a single number has no interval."""
        return f"{self.mean:.3f} ± {self.half:.3f}" if self.count > 1 else f"{self.mean:.3f}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold by how much one arm is above another over the seeds of both: below 0 it is better.

    `percent` and `percent_half` are the difference and the half width of its interval, in
    hundredths of the other's mean.
    """

    difference: Interval
    percent: float
    percent_half: float
    wins: int

    def __str__(self) -> str:
        """Return it as "-1.2 ± 0.3 % (5 of 5)": what it is, its interval, how often it won."""
        half = f" ± {self.percent_half:.1f}" if self.difference.count > 1 else ""
        return f"{self.percent:+.1f}{half} % ({self.wins} of {self.difference.count})"


def interval(values: Mapping[int, float]) -> Interval:
    """Return the mean of values by seed, and its interval by Student's t distribution."""
    numbers = list(values.values())
    count = len(numbers)
    if count < 2:
        return Interval(fmean(numbers), nan, count)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(fmean(numbers), quantile * stdev(numbers) / sqrt(count), count)


def compare(losses: Mapping[int, float], other: Mapping[int, float]) -> Comparison | None:
    """Compare losses by seed, pair by pair; None if no seed has both."""
    both = sorted(set(losses) & set(other))
    if not both:
        return None
    difference = interval({seed: losses[seed] - other[seed] for seed in both})
    unit = fmean(other[seed] for seed in both) / 100
    wins = sum(losses[seed] < other[seed] for seed in both)
    return Comparison(difference, difference.mean / unit, difference.half / unit, wins)
