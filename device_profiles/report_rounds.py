"""The report's charts over rounds: held-out loss, ranks, and who weighed how much."""

from __future__ import annotations

import math
from collections.abc import Iterator

from device_profiles.report_figure import (
    COLOURS,
    EN_DASH,
    END_PX,
    NARROW_SPACE,
    Chart,
    Figure,
    axis,
    count_of,
    device_colour,
    device_dash,
    device_trace,
    end_annotation,
    hover,
    layout,
    percent,
    plot_text,
    rows_height,
    some_of,
    spread,
)
from device_profiles.summary import DeviceRound, DeviceSummary, Round, Summary, mean
from protocol.human import human_bytes, human_seconds

LINES_PX = 340
"""Least height of a chart of lines."""
MARGIN_PX = {"l": 46, "r": 128, "t": 14, "b": 44}
"""Margins of a chart with names at the lines' ends."""


def round_charts(summary: Summary) -> Iterator[Chart]:
    """Yield the charts that have something to show."""
    if not summary.history:
        return
    for chart in (_loss_chart(summary), _rank_chart(summary), _weight_chart(summary)):
        if chart is not None:
            yield chart


def _of_device(summary: Summary, name: str) -> list[tuple[Round, DeviceRound]]:
    return [(r, r.devices[name]) for r in summary.history if name in r.devices]


def _rounds_axis(summary: Summary) -> Figure:
    """Return the axis of rounds; one place after the last stands for the end of the replay."""
    numbers = [r.round for r in summary.history]
    first, last = min(numbers), max(numbers)
    step = math.ceil((last - first + 1) / 8)
    ticks = [n for n in range(first, last + 1, step) if last + 1 - n > step / 2]
    return axis(
        "round",
        tickvals=[*ticks, last + 1],
        ticktext=[*map(str, ticks), "end"],
        range=[first - 0.1, last + 1.05],
        showgrid=False,
    )


def _end(summary: Summary) -> int:
    return max(r.round for r in summary.history) + 1


def _loss_chart(summary: Summary) -> Chart | None:
    """Return held-out loss over rounds, with the level each device reaches alone."""
    few = len(summary.devices) <= COLOURS
    traces: list[Figure] = []
    ends: list[tuple[int, float]] = []
    seen: list[float] = []
    for index, device in enumerate(summary.devices):
        points = _loss_points(summary, device)
        if points:
            ends.append((index, points[-1][1]))
            traces.append(_loss_line(index, points, few))
            seen += [loss for _, loss, _ in points]
        if device.loss.local is not None and points:
            traces.append(_local_level(summary, index, device, few))
            seen += [device.loss.local] if few else []
    if not seen:
        return None
    if not few:
        traces.append(_mean_line(summary))
    pad = max((max(seen) - min(seen)) * 0.06, 0.02)
    low, high = min(seen) - pad, max(seen) + pad
    height = max(LINES_PX + 40, rows_height(len(summary.devices))) if few else LINES_PX + 100
    yaxis = axis("held-out loss, nats/token", range=[low, high], nticks=6)
    return Chart(
        "loss-rounds",
        "Held-out loss, round by round",
        f"What {_held(summary, 'the shared adapter each device holds')} says of text it never "
        "trained on.",
        {
            "data": traces,
            "layout": layout(
                height,
                _rounds_axis(summary),
                yaxis,
                margin=MARGIN_PX if few else MARGIN_PX | {"r": 12},
                annotations=_end_labels(summary, ends, (low, high), height) if few else [],
            ),
        },
        span=4 if few else 6,
        key=(("line", _held(summary, "shared adapter")), ("dash", "where the device ends alone"))
        if few
        else (("line", "a device"), ("strong", "mean"), ("dash", "alone, for a chosen device")),
    )


def _held(summary: Summary, shared: str) -> str:
    """Return what devices hold, in words."""
    return "the adapter of each device" if summary.is_personal else shared


def _loss_points(summary: Summary, device: DeviceSummary) -> list[tuple[int, float, str]]:
    """Return (round, loss, hover text) of a device, the end of the replay last."""
    points = []
    for entry, own in _of_device(summary, device.name):
        if own.loss is not None:
            lines = [f"round {entry.round}: {own.loss:.3f} nats/token held out"]
            if own.train_loss is not None:
                lines.append(f"then trained at {own.train_loss:.3f}")
            lines.append(f"up {human_bytes(own.bytes_up)}, down {human_bytes(own.bytes_down)}")
            points.append((entry.round, own.loss, hover(device.name, *lines)))
    loss = device.loss
    on_device = loss.merged_on_device if loss.personal is None else loss.personal
    last = on_device if on_device is not None else loss.merged
    if points and last is not None:
        text = hover(device.name, f"end: {last:.3f} nats/token held out")
        points.append((_end(summary), last, text))
    return points


def _loss_line(index: int, points: list[tuple[int, float, str]], few: bool) -> Figure:
    x, y, text = zip(*points, strict=True)
    dot_px = 4 if few and len(points) <= 30 else 0
    width = 2 if few else 1.3
    return device_trace(
        index,
        x=list(x),
        y=list(y),
        hovertext=list(text),
        mode="lines+markers",
        line={
            "color": device_colour(index),
            "width": width,
            "dash": device_dash(index),
        },
        marker={
            "size": [dot_px] * (len(points) - 1) + [8 if few else 6],
            "color": device_colour(index),
            "opacity": 1,
            "line": {"width": 0},
        },
    )


def _local_level(summary: Summary, index: int, device: DeviceSummary, shown: bool) -> Figure:
    first = min(r.round for r in summary.history)
    return device_trace(
        index,
        x=[first, _end(summary)],
        y=[device.loss.local] * 2,
        hovertext=hover(device.name, f"alone: {device.loss.local:.3f} nats/token held out"),
        mode="lines",
        line={"color": device_colour(index, 0.6), "width": 1.2, "dash": "4px,4px"},
        meta={} if shown else {"quiet": True},
    )


def _mean_line(summary: Summary) -> Figure:
    x, y = [], []
    for entry in summary.history:
        average = mean(own.loss for own in entry.devices.values())
        if average is not None:
            x.append(entry.round)
            y.append(average)
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "mode": "lines",
        "line": {"color": "$ink", "width": 3.5},
        "hoverinfo": "text",
        "hovertext": [f"<b>mean</b><br>{loss:.3f} nats/token held out" for loss in y],
    }


def _end_labels(
    summary: Summary, ends: list[tuple[int, float]], span: tuple[float, float], height: float
) -> list[Figure]:
    """Return the devices' names at their lines' ends, pushed apart where they would collide."""
    low, high = span
    px_per_unit = (height - MARGIN_PX["t"] - MARGIN_PX["b"]) / (high - low)
    wanted = [y * px_per_unit for _, y in ends]
    return [
        end_annotation(index, summary.devices[index].name, y, px - y * px_per_unit)
        for (index, y), px in zip(ends, spread(wanted, END_PX), strict=True)
    ]


def _rank_chart(summary: Summary) -> Chart | None:
    """Return each device's rank over rounds as steps on a scale of doublings."""
    few = len(summary.devices) <= COLOURS
    traces, ends, ranks = [], [], set(summary.ladder)
    for index, device in enumerate(summary.devices):
        points = [(e.round, o.rank) for e, o in _of_device(summary, device.name) if o.rank]
        if not points:
            continue
        points.append((_end(summary), device.rank_end or points[-1][1]))
        ranks |= {rank for _, rank in points}
        offset = (index - (len(summary.devices) - 1) / 2) / max(len(summary.devices), 8) * 0.5
        traces.append(_rank_line(index, device, points, offset, few))
        ends.append((index, math.log2(points[-1][1]) + offset))
    if not traces:
        return None
    span = (math.log2(min(ranks)) - 0.5, math.log2(max(ranks)) + 0.5)
    shown = sorted(summary.ladder or ranks)
    yaxis = axis("rank", range=list(span), tickvals=[math.log2(r) for r in shown if r > 0])
    yaxis["ticktext"] = [str(r) for r in shown if r > 0]
    labels = _end_labels(summary, ends, span, LINES_PX) if few else []
    margin = MARGIN_PX if few else MARGIN_PX | {"r": 12}
    figure = {
        "data": traces,
        "layout": layout(LINES_PX, _rounds_axis(summary), yaxis, margin=margin, annotations=labels),
    }
    return Chart("ranks", "Ranks", _rank_note(summary), figure, span=3 if few else 6)


def _rank_line(
    index: int, device: DeviceSummary, points: list[tuple[int, int]], offset: float, few: bool
) -> Figure:
    """Return steps on log2 of the rank, moved a little so that equal ranks do not hide."""
    return device_trace(
        index,
        x=[x for x, _ in points],
        y=[math.log2(rank) + offset for _, rank in points],
        hovertext=[hover(device.name, f"rank {rank}") for _, rank in points],
        mode="lines",
        line={
            "color": device_colour(index),
            "width": 2.4 if few else 1.3,
            "shape": "hv",
            "dash": device_dash(index),
        },
    )


def _rank_note(summary: Summary) -> str:
    cut = [
        f"{d.name} {d.rank_start} → {d.rank_end}"
        for d in summary.devices
        if d.rank_start and d.rank_end and d.rank_end < d.rank_start
    ]
    if not cut:
        return "Each device kept the rank that its memory allowed."
    return f"{count_of(len(cut), 'device')} cut directions not needed: {some_of(cut)}."


def _weight_chart(summary: Summary) -> Chart | None:
    """Return each device's share in each merge: stacked bars, or a heat map of many devices."""
    if not any(o.weight is not None for r in summary.history for o in r.devices.values()):
        return None
    few = len(summary.devices) <= COLOURS
    figure = _weight_bars(summary) if few else _weight_map(summary)
    note = _weight_note(summary)
    return Chart("weights", "Who weighed how much", note, figure, span=3 if few else 6)


def _weight_note(summary: Summary) -> str:
    note = "Each device's share in the merge of each round."
    warned = [f"round {r.round}: {why}" for r in summary.history for why in r.warnings]
    return f"{note} Warnings: {some_of(warned, '; ')}." if warned else note


def _weight_bars(summary: Summary) -> Figure:
    traces, last, base = [], [], 0.0
    for index, device in enumerate(summary.devices):
        own = [(r, o.weight) for r, o in _of_device(summary, device.name) if o.weight is not None]
        traces.append(
            device_trace(
                index,
                type="bar",
                x=[r.round for r, _ in own],
                y=[weight for _, weight in own],
                hovertext=[_weight_hover(device.name, r, weight) for r, weight in own],
                marker={"color": device_colour(index), "line": {"color": "$paper", "width": 1}},
            )
        )
        if own and own[-1][0] is summary.history[-1]:
            last.append((index, base + own[-1][1] / 2))
            base += own[-1][1]
    for trace in traces:
        trace.pop("cliponaxis")
        trace["marker"]["opacity"] = 0.9
    numbers = [r.round for r in summary.history]
    xaxis = _rounds_axis(summary)
    xaxis["range"] = [min(numbers) - 0.5, max(numbers) + 0.5]
    quarters = [0, 0.25, 0.5, 0.75, 1]
    yaxis = axis("share in the merge", range=[0, 1.02], tickvals=quarters, showgrid=False)
    yaxis["ticktext"] = [f"{quarter * 100:.0f}{NARROW_SPACE}%" for quarter in quarters]
    labels = _end_labels(summary, last, (0, 1.02), LINES_PX)
    return {
        "data": traces,
        "layout": layout(
            LINES_PX,
            xaxis,
            yaxis,
            barmode="stack",
            bargap=0.12,
            margin=MARGIN_PX | {"l": 54},
            annotations=labels,
        ),
    }


def _weight_map(summary: Summary) -> Figure:
    rows = [
        [r.devices[d.name].weight if d.name in r.devices else None for r in summary.history]
        for d in summary.devices
    ]
    texts = [
        [
            hover(device.name, f"round {r.round}: no part")
            if weight is None
            else _weight_hover(device.name, r, weight)
            for r, weight in zip(summary.history, row, strict=True)
        ]
        for device, row in zip(summary.devices, rows, strict=True)
    ]
    count = len(summary.devices)
    trace = {
        "type": "heatmap",
        "x": [r.round for r in summary.history],
        "y": list(range(count)),
        "z": rows,
        "text": texts,
        "hoverinfo": "text",
        "xgap": 2,
        "ygap": 2,
        "zmin": 0,
        "colorscale": [[0, "$heat0"], [1, "$heat1"]],
        "showscale": False,
    }
    names = [plot_text(device.name, 14) for device in summary.devices]
    yaxis = axis(range=[count - 0.5, -0.5], tickvals=list(range(count)), ticktext=names)
    xaxis = _rounds_axis(summary) | {"range": None, "autorange": True}
    margin = {"l": 108, "r": 8, "t": 8, "b": 44}
    return {"data": [trace], "layout": layout(20 * count + 52, xaxis, yaxis, margin=margin)}


def _weight_hover(name: str, entry: Round, weight: float) -> str:
    lines = [f"round {entry.round}: {percent(weight)} of the merge"]
    if entry.merge_s is not None:
        version = EN_DASH if entry.version is None else str(entry.version)
        lines.append(f"version {version}, merged in {human_seconds(entry.merge_s)}")
    return hover(name, *lines)
