"""What all charts share: axes, a column for each round, and what is told of it when asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

HEIGHT_PX = 190
Y_AXIS_PX = 52
LABELS = 12
"""Most numbers of rounds that are written below a chart."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Map values to heights: `low` at the bottom, `high` at the top."""

    low: float
    high: float
    ticks: tuple[float, ...]
    height: float = HEIGHT_PX

    def y(self, value: float) -> float:
        """Return how many pixels from the top a value is, with two decimals."""
        return round(self.height * (self.high - value) / (self.high - self.low), 2)


def scale_of(low: float, high: float, *, height: float = HEIGHT_PX, steps: int = 4) -> Scale:
    """Return a scale that holds both values, with about `steps` round numbers on it."""
    size = max(abs(low), abs(high))
    if high - low < max(1e-6 * size, 1e-9):
        pad = 0.1 * size if size > 1e-9 else 1.0
        low, high = low - pad * (low != 0), high + pad
    step = _nice((high - low) / steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(n * step, 12) for n in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, height)


def _nice(raw: float) -> float:
    """Return 1, 2 or 5 times a power of ten, not smaller than a number."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= raw * 0.999)


@dataclass(frozen=True, slots=True)
class Column:
    """A round's place in a chart, and what is told of it there."""

    label: str
    tip: str
    """One line each: what is shown where it is pointed at."""


def centre(index: int, count: int) -> float:
    """Return where a column's middle is, as a percentage of the width."""
    return round((index + 0.5) * 100 / count, 3)


def frame(
    marks: str,
    columns: Sequence[Column],
    scale: Scale,
    words: Callable[[float], str],
    *,
    label: str,
) -> Markup:
    """Return a chart: its marks, drawn by the caller, between axes and under its columns.

    `label` says to who can't see it what it shows; `words` writes a value of the axis.
    """
    return Markup(
        f'<div class="chart" tabindex="0" role="img" aria-label="{escape(label)}" data-chart="">'
        f"{_y_axis(scale, words)}"
        f'<svg class="plot" width="100%" height="{scale.height:g}" aria-hidden="true">'
        f"{_grid(scale)}{marks}{_hits(columns, scale)}</svg>"
        f"{_x_axis([column.label for column in columns])}</div>"
    )


def _y_axis(scale: Scale, words: Callable[[float], str]) -> str:
    rows = "".join(
        f'<text x="{Y_AXIS_PX - 8}" y="{scale.y(tick):g}" dy="4" text-anchor="end">'
        f"{escape(words(tick))}</text>"
        for tick in scale.ticks
    )
    return (
        f'<svg class="y" width="{Y_AXIS_PX}" height="{scale.height:g}" aria-hidden="true">'
        f"{rows}</svg>"
    )


def _grid(scale: Scale) -> str:
    return "".join(
        f'<line class="{"zero" if tick == 0 else "grid"}" x1="0" x2="100%" '
        f'y1="{scale.y(tick):g}" y2="{scale.y(tick):g}"/>'
        for tick in scale.ticks
    )


def _x_axis(labels: Sequence[str]) -> str:
    """Return the numbers of rounds below the columns: all of them, or the round ones among them."""
    count = len(labels)
    step = _nice(count / LABELS) if count > LABELS else 1
    rows = "".join(
        f'<text x="{centre(i, count):g}%" y="15" text-anchor="middle">{escape(label)}</text>'
        for i, label in enumerate(labels)
        if step == 1 or int(label) % round(step) == 0
    )
    return f'<svg class="x" width="100%" height="20" aria-hidden="true">{rows}</svg>'


def _hits(columns: Sequence[Column], scale: Scale) -> str:
    width = 100 / max(len(columns), 1)
    return "".join(
        f'<rect class="hit" x="{i * width:.3f}%" y="0" width="{width:.3f}%" '
        f'height="{scale.height:g}" data-tip="{in_attribute(column.tip)}"/>'
        for i, column in enumerate(columns)
    )


def in_attribute(text: str) -> str:
    """Return lines as they stand in an attribute, which else may be read as one line."""
    return str(escape(text)).replace("\n", "&#10;")


def stretched(inside: str, height: float) -> str:
    """Return marks whose x goes from 0 to 100 over the whole width, and whose y is pixels."""
    return (
        f'<svg viewBox="0 0 100 {height:g}" preserveAspectRatio="none" width="100%" '
        f'height="{height:g}">{inside}</svg>'
    )


def bar(index: int, count: int, top: float, bottom: float, kind: str) -> str:
    """Return a column's bar from one height to another, in pixels; `kind` is its class."""
    width = min(72 / count, 9)
    if bottom - top < 0.5:
        top = bottom - 0.5
    return (
        f'<rect class="{kind}" x="{centre(index, count) - width / 2:.3f}%" y="{top:.2f}" '
        f'width="{width:.3f}%" height="{bottom - top:.2f}"/>'
    )
