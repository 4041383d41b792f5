"""Who trusts whom, as a map of cells; of a large fleet as blocks of devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from aggregator.issued import TrustMatrix
from aggregator.page.charts.frame import in_attribute

CELLS = 40
"""Rows and columns at most: above that many devices each stands for a block of them."""
NUMBERS = 12
"""Rows up to which each cell has its number."""
ROW_PX = 26
SLIM_ROW_PX = 13
NAMES_PX = 108
NAME = 15
"""Characters of a name that are shown."""


def heat_map(matrix: TrustMatrix, round_number: int) -> Markup:
    """Return of whose adapters (columns) each device's own (rows) was mixed, in per cent."""
    names, cells, size = _blocks(matrix.devices, matrix.weights)
    count = len(names)
    row = ROW_PX if count <= NUMBERS else SLIM_ROW_PX
    most = max((cell for line in cells for cell in line), default=1.0) or 1.0
    marks = "".join(
        _cell(i, j, cells[i][j], most, count, row, f"{names[i]}\n{_share(cells[i][j], names[j])}")
        for i in range(count)
        for j in range(count)
    )
    labels = "".join(
        f'<text x="{NAMES_PX - 10}" y="{i * row + row / 2:g}" dy="4" text-anchor="end">'
        f"{escape(_short(name))}</text>"
        for i, name in enumerate(names)
        if row >= ROW_PX or i % 2 == 0
    )
    label = f"Who trusts whom after round {round_number}: {len(matrix.devices)} devices"
    label += f" in blocks of {size}" if size > 1 else ""
    return Markup(
        f'<div class="chart heat" tabindex="0" role="img" aria-label="{escape(label)}" '
        'data-chart="">'
        f'<svg class="y" width="{NAMES_PX}" height="{count * row}" aria-hidden="true">{labels}'
        f'</svg><svg class="plot" width="100%" height="{count * row}" aria-hidden="true">{marks}'
        f"</svg>{_columns(names) if count <= NUMBERS else ''}</div>"
    )


def _columns(names: Sequence[str]) -> str:
    """Return the columns' names, for where there is room."""
    labels = "".join(
        f'<text x="{100 * (j + 0.5) / len(names):.3f}%" y="15" text-anchor="middle">'
        f"{escape(_short(name, max(5, 90 // len(names))))}</text>"
        for j, name in enumerate(names)
    )
    return f'<svg class="x" width="100%" height="20" aria-hidden="true">{labels}</svg>'


def block_size(devices: int) -> int:
    """Return how many devices a row of the map stands for."""
    return max(1, math.ceil(devices / CELLS))


def _blocks(
    devices: Sequence[str], weights: Sequence[Sequence[float]]
) -> tuple[list[str], list[list[float]], int]:
    """Return names and weights (B, B) of blocks of devices, and how many each has.

    A block's weight is the sum over its columns of the mean over its rows, so that rows sum to 1.
    """
    size = block_size(len(devices))
    if size == 1:
        return list(devices), [list(line) for line in weights], 1
    starts = range(0, len(devices), size)
    ends = [min(start + size, len(devices)) for start in starts]
    names = [
        devices[start] if end - start == 1 else f"{devices[start]} … {devices[end - 1]}"
        for start, end in zip(starts, ends, strict=True)
    ]
    narrow = [[sum(line[s:e]) for s, e in zip(starts, ends, strict=True)] for line in weights]
    cells = [
        [sum(column) / (end - start) for column in zip(*narrow[start:end], strict=True)]
        for start, end in zip(starts, ends, strict=True)
    ]
    return names, cells, size


def _cell(i: int, j: int, value: float, most: float, count: int, row: int, tip: str) -> str:
    share = value / most
    x, width = 100 * j / count, 100 / count
    number = (
        f'<text class="{"over" if share > 0.55 else "under"}" x="{x + width / 2:.3f}%" '
        f'y="{i * row + row / 2:g}" dy="4" text-anchor="middle">{100 * value:.0f}</text>'
        if count <= NUMBERS
        else ""
    )
    return (
        f'<rect class="cell" x="{x:.3f}%" y="{i * row}" width="{width:.3f}%" height="{row}" '
        f'fill-opacity="{share:.3f}"/>{number}'
        f'<rect class="hit" x="{x:.3f}%" y="{i * row}" width="{width:.3f}%" height="{row}" '
        f'data-tip="{in_attribute(tip)}"/>'
    )


def _share(value: float, name: str) -> str:
    return f"{100 * value:.1f} % of {name}"


def _short(name: str, most: int = NAME) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
