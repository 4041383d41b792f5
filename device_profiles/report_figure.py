"""What every chart of the report shares: figures as plain dicts, colours as tokens, labels.

A figure is the dict that plotly.js draws. A colour in it is a token such as "$d0", "$muted" or
"$d0/0.2" (with opacity): the names are the custom properties of look.css, which the page's
script fills in for the reader's colour scheme. So one figure serves light and dark.

A trace's `meta.device` and an annotation's `name` ("end:3", "row:3") say whose they are, so that
the page can bring one device to the front; "end" annotations leave where the page is narrow.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]
Mark = tuple[str, str]
"""One entry of a chart's key: the class of its glyph in report_page.css, and what it means."""

COLOURS = 8
"""How many device colours there are; kept apart for the three kinds of colour blindness."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""Beyond `COLOURS` devices, the dash of a line tells those of one colour apart."""
ROW_PX = 50
"""Height of one device's row: its name and value above, its marks below."""
SLIM_ROW_PX = 24
"""Height of one device's row where there are more than `COLOURS`: all on one line."""
END_PX = 17
"""Least distance between two labels at the lines' ends."""

EN_DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Chart:
    """Hold one chart with the words around it (plain text, not HTML)."""

    slug: str
    title: str
    note: str
    figure: Figure
    span: int = 3
    """How many of the page's six columns it takes."""
    key: tuple[Mark, ...] = ()


def device_colour(index: int, opacity: float | None = None) -> str:
    """Return the colour token of the device at `index`."""
    token = f"$d{index % COLOURS}"
    return token if opacity is None else f"{token}/{opacity:g}"


def device_dash(index: int) -> str:
    """Return the dash of the device's lines."""
    return DASHES[index // COLOURS % len(DASHES)]


def plot_text(text: str, limit: int = 22) -> str:
    """Return `text` as plotly.js shows it literally, shortened to `limit` characters."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return html.escape(short)


def hover(name: str, *lines: str) -> str:
    """Return a hover text: the device's name, then lines that are already escaped."""
    return "<br>".join((f"<b>{plot_text(name, 60)}</b>", *lines))


def device_trace(index: int, **trace: Any) -> Figure:
    """Return a trace that belongs to the device at `index`."""
    meta = {"device": index} | trace.pop("meta", {})
    return {"type": "scatter", "hoverinfo": "text", "cliponaxis": False, **trace, "meta": meta}


def end_annotation(index: int, name: str, y: float, shift_px: float) -> Figure:
    """Return a device's name right of the plot, `shift_px` above the height `y`."""
    return {
        "name": f"end:{index}",
        "text": plot_text(name, 16),
        "x": 1,
        "xref": "paper",
        "xanchor": "left",
        "xshift": 10,
        "y": y,
        "yshift": shift_px,
        "showarrow": False,
        "font": {"color": device_colour(index), "size": 12},
    }


def row_annotations(index: int, name: str, value: str, count: int) -> list[Figure]:
    """Return a row's value on the right and its name on the left, above the row.

    Of many devices (`count`) only the value is returned, right of the row: the names stand on the
    axis.
    """
    common = {"name": f"row:{index}", "xref": "paper", "y": index, "yshift": 19, "showarrow": False}
    common |= {"bgcolor": "$paper", "borderpad": 0}  # no grid line strikes a word through
    left = {"text": plot_text(name), "x": 0, "xanchor": "left", "font": {"color": "$ink"}}
    right = {"text": value, "x": 1, "xanchor": "right", "font": {"color": "$muted"}}
    if count <= COLOURS:
        return [common | left, common | right]
    beside = {"name": f"end:{index}", "yshift": 0, "xanchor": "left", "xshift": 8}
    return [common | right | beside]


def axis(title: str = "", **more: Any) -> Figure:
    """Return a quiet axis: light grid, no line, no zoom."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": "$muted"}, "standoff": 12},
        "fixedrange": True,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "gridcolor": "$grid",
        "tickfont": {"size": 11.5, "color": "$muted"},
        "automargin": False,
        **more,
    }


def layout(height: float, xaxis: Figure, yaxis: Figure, **more: Any) -> Figure:
    """Return the layout of a chart that is `height` pixels high."""
    clear = "rgba(0,0,0,0)"
    return {
        "height": round(height),
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "font": {"family": "system-ui, sans-serif", "size": 12.5, "color": "$muted"},
        "hoverlabel": {
            "bgcolor": "$raised",
            "bordercolor": "$rule",
            "font": {"color": "$ink", "size": 12.5},
            "align": "left",
        },
        "margin": {"l": 44, "r": 12, "t": 8, "b": 44},
        "xaxis": xaxis,
        "yaxis": yaxis,
        **more,
    }


def rows_height(count: int) -> float:
    """Return the height in pixels of a chart with one row a device."""
    return 53 + count * (ROW_PX if count <= COLOURS else SLIM_ROW_PX)


def rows_layout(names: Sequence[str], xaxis: Figure, annotations: list[Figure]) -> Figure:
    """Return the layout of a chart with one row a device, the first on top."""
    count = len(names)
    few = count <= COLOURS
    yaxis = axis(range=[count - 0.5, -0.6], showgrid=False, showticklabels=not few)
    yaxis |= {"tickvals": list(range(count)), "ticktext": [plot_text(n, 14) for n in names]}
    sides = {"l": 2, "r": 2} if few else {"l": 104, "r": 164}
    margin = {"t": 4, "b": 44, **sides}
    return layout(rows_height(count), xaxis, yaxis, annotations=annotations, margin=margin)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Return `positions` moved as little as is simple, so that no two lie closer than `gap`.

    Neighbours that collide form a block around the mean of where they wanted to be.
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _top(blocks[-2], positions, gap) + gap > _bottom(
            blocks[-1], positions, gap
        ):
            last = blocks.pop()
            blocks[-1] += last
    moved = list(positions)
    for block in blocks:
        for place, index in enumerate(block):
            moved[index] = _bottom(block, positions, gap) + place * gap
    return moved


def _bottom(block: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return math.fsum(positions[i] for i in block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return _bottom(block, positions, gap) + gap * (len(block) - 1)


def percent(share: float) -> str:
    """Return a share as a percentage: "8 %", "0.4 %"."""
    digits = 0 if abs(share) >= 0.0095 or share == 0 else 1
    return f"{abs(share) * 100:.{digits}f}{NARROW_SPACE}%"


def count_of(count: int, noun: str) -> str:
    """Return "1 device", "6 devices"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some_of(names: Sequence[str], between: str = ", ") -> str:
    """Return up to three names, then how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return between.join(names[:3]) + more
