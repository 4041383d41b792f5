"""The report's chart of personal adapters: of whose adapters each device's own was mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from device_profiles.report_figure import (
    COLOURS,
    Chart,
    Figure,
    axis,
    hover,
    layout,
    percent,
    plot_text,
)
from device_profiles.summary import Round, Summary, Trust

ROW_PX = 40
SLIM_ROW_PX = 20
SLIDER_PX = 76
MARGIN_PX = {"l": 96, "r": 8, "t": 4, "b": 78}
"""Room for the devices' names on the left, and slanting below."""
SCALE_PX = 64
"""Room for the scale on the right, where there is one."""
NAME = 12
"""Characters of a name that are shown."""


def trust_charts(summary: Summary) -> Iterator[Chart]:
    """Yield the matrix of the last round that has one; of few devices a slider has all rounds."""
    rounds = [(entry, entry.trust) for entry in summary.history if entry.trust is not None]
    if not rounds:
        return
    names = [device.name for device in summary.devices]
    few = len(names) <= COLOURS
    last, trust = rounds[-1]
    most = _most([trust for _, trust in (rounds if few else rounds[-1:])])
    trace = {
        "type": "heatmap",
        "x": list(range(len(names))),
        "y": list(range(len(names))),
        **_cells(names, last, trust, few),
        "hoverinfo": "text",
        "texttemplate": "%{text}" if few else "",
        "xgap": 2,
        "ygap": 2,
        "zmin": 0,
        "zmax": most,
        "colorscale": [[0, "$heat0"], [1, "$heat1"]],
        "showscale": not few,
        "colorbar": _scale(most),
    }
    yield Chart(
        "trust",
        "Who trusts whom",
        "Of whose adapters (columns) each device's own (rows) was mixed, in per cent, after round "
        f"{last.round}{'; the slider has the others' if few and len(rounds) > 1 else ''}. The "
        f"strongest colour is for {percent(most)} and more.",
        {"data": [trace], "layout": _layout(names, rounds if few else [], few)},
        span=3 if few else 6,
    )


def _most(matrices: Sequence[Trust]) -> float:
    """Return the largest share of another's adapter, above which colours are all alike.

    A device may trust itself ten times as far: scaled to that, all others would look alike.
    """
    others = (
        weight
        for trust in matrices
        for i, row in enumerate(trust.weights)
        for j, weight in enumerate(row)
        if i != j
    )
    return max(others, default=0.0) or 1.0


def _scale(most: float) -> Figure:
    """Return what tells colours apart where there is no room for numbers in the cells."""
    values = [0, most / 2, most]
    return {
        "tickvals": values,
        "ticktext": [percent(value) for value in values],
        "tickfont": {"size": 11.5, "color": "$muted"},
        "thickness": 10,
        "xpad": 8,
        "outlinewidth": 0,
    }


def _cells(names: list[str], entry: Round, trust: Trust, few: bool) -> Figure:
    """Return the matrix (rows, columns) in the order of all devices, its texts and hover texts."""
    at = {name: index for index, name in enumerate(trust.devices)}

    def weight(row: str, column: str) -> float | None:
        return trust.weights[at[row]][at[column]] if row in at and column in at else None

    z = [[weight(row, column) for column in names] for row in names]
    told = [
        [_hover(entry, trust, row, column, z[i][j]) for j, column in enumerate(names)]
        for i, row in enumerate(names)
    ]
    text = [["" if w is None else f"{100 * w:.0f}" for w in line] for line in z]
    return {"z": z, "hovertext": told, "text": text if few else []}


def _hover(entry: Round, trust: Trust, row: str, column: str, weight: float | None) -> str:
    if weight is None:
        return hover(row, f"round {entry.round}: no part of {plot_text(column)}")
    lines = [f"round {entry.round}: {percent(weight)} of {plot_text(column)}"]
    heat = trust.temperatures.get(row)
    lines.append("the common adapter" if heat is None else f"temperature {heat:.3g}")
    return hover(row, *lines)


def _layout(names: list[str], rounds: list[tuple[Round, Trust]], few: bool) -> Figure:
    ticks: Figure = {"tickvals": list(range(len(names)))}
    ticks["ticktext"] = [plot_text(name, NAME) for name in names]
    xaxis = axis(**ticks, tickangle=-40, showgrid=False)
    yaxis = axis(**ticks, range=[len(names) - 0.5, -0.5], showgrid=False)
    height = len(names) * (ROW_PX if few else SLIM_ROW_PX) + MARGIN_PX["t"] + MARGIN_PX["b"]
    if len(rounds) < 2:
        right = MARGIN_PX["r"] if few else SCALE_PX
        return layout(height, xaxis, yaxis, margin=MARGIN_PX | {"r": right})
    margin = MARGIN_PX | {"b": MARGIN_PX["b"] + SLIDER_PX}
    return layout(height + SLIDER_PX, xaxis, yaxis, margin=margin, sliders=[_slider(names, rounds)])


def _slider(names: list[str], rounds: list[tuple[Round, Trust]]) -> Figure:
    def step(entry: Round, trust: Trust) -> Figure:
        cells = {key: [value] for key, value in _cells(names, entry, trust, few=True).items()}
        return {"label": str(entry.round), "method": "restyle", "args": [cells]}

    return {
        "active": len(rounds) - 1,
        "steps": [step(entry, trust) for entry, trust in rounds],
        "x": 0,
        "len": 1,
        "y": 0,
        "pad": {"t": MARGIN_PX["b"] - 12, "b": 0, "l": 0, "r": 8},
        "currentvalue": {
            "prefix": "round ",
            "xanchor": "left",
            "offset": 6,
            "font": {"size": 12.5, "color": "$ink"},
        },
        "font": {"size": 11, "color": "$muted"},
        "bgcolor": "$accent",
        "activebgcolor": "$accent",
        "bordercolor": "$rule",
        "borderwidth": 0,
        "tickcolor": "$faint",
        "ticklen": 4,
        "minorticklen": 0,
    }
