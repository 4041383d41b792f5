"""The report's charts with one row a device: loss, memory and traffic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from device_profiles.report_figure import (
    COLOURS,
    EN_DASH,
    MINUS,
    Chart,
    Figure,
    axis,
    device_colour,
    device_trace,
    hover,
    percent,
    row_annotations,
    rows_layout,
    some_of,
)
from device_profiles.summary import MEMORY_BAND, DeviceSummary, Summary
from protocol.human import human_bytes

LOG_FROM = 6.0
"""Where the largest figure is this many times the smallest, a scale of doublings shows both."""


def row_charts(summary: Summary) -> Iterator[Chart]:
    """Yield the charts that have something to show."""
    for chart in (_loss_chart(summary), _memory_chart(summary), _traffic_chart(summary)):
        if chart is not None:
            yield chart


def _line(index: int, x: Sequence[float], text: str, **line: Any) -> Figure:
    return device_trace(
        index, x=list(x), y=[index] * len(x), mode="lines", hovertext=text, line=line
    )


def _dot(index: int, x: float | None, text: str, **marker: Any) -> list[Figure]:
    if x is None:
        return []
    return [device_trace(index, x=[x], y=[index], mode="markers", hovertext=text, marker=marker)]


def _tick(index: int, x: float | None, text: str, colour: str, size: float) -> list[Figure]:
    line = {"color": colour, "width": 2}
    return _dot(index, x, text, symbol="line-ns-open", size=size, color=colour, line=line)


def _loss_chart(summary: Summary) -> Chart | None:
    """Return base, alone, merged and its own as dots on one line a device."""
    names = [device.name for device in summary.devices]
    traces: list[Figure] = []
    notes: list[Figure] = []
    for index, device in enumerate(summary.devices):
        traces += _loss_row(index, device)
        notes += row_annotations(index, device.name, _loss_value(device), len(names))
    if not traces:
        return None
    xaxis = axis("held-out loss, nats/token", nticks=7)
    figure = {"data": traces, "layout": rows_layout(names, xaxis, notes)}
    span = 2 if len(summary.devices) <= COLOURS else 6
    merged = [("merged", "merged")]
    if summary.is_personal:
        merged = [("common", "common"), ("merged", "its own")]
    key = (("base", "base"), ("local", "alone"), *merged, ("held", "cut to its rank"))
    return Chart("loss-devices", "Alone or together", _loss_note(summary), figure, span, key)


def _loss_row(index: int, device: DeviceSummary) -> list[Figure]:
    loss = device.loss
    named = {
        "base": loss.base,
        "alone": loss.local,
        "merged" if loss.personal is None else "common": loss.merged,
        "its own": loss.personal,
        "merged, cut to its rank": loss.merged_on_device,
    }
    known = [value for value in named.values() if value is not None]
    lines = [f"{label} {value:.3f}" for label, value in named.items() if value is not None]
    text = hover(device.name, *lines, "nats/token, held out")
    traces = []
    if len(known) > 1:
        traces.append(_line(index, [min(known), max(known)], text, color="$rule", width=1.5))
    if loss.local is not None and loss.together is not None:
        colour = device_colour(index, 0.45)
        traces.append(_line(index, [loss.local, loss.together], text, color=colour, width=5))
    ring = {"color": device_colour(index), "width": 2}
    grey = {"color": "$faint", "width": 1.5}
    traces += _dot(index, loss.base, text, size=9, color="$paper", line=grey)
    traces += _dot(index, loss.local, text, size=11, color="$paper", line=ring)
    if _differs(loss.merged_on_device, loss.merged):
        held = loss.merged_on_device
        traces += _dot(index, held, text, size=12, symbol="diamond", color="$paper", line=ring)
    if loss.personal is not None:
        traces += _dot(index, loss.merged, text, size=8, color="$faint")
    traces += _dot(index, loss.together, text, size=12, color=device_colour(index))
    return traces


def _differs(held: float | None, merged: float | None) -> bool:
    return held is not None and (merged is None or abs(held - merged) > 0.002)


def _loss_value(device: DeviceSummary) -> str:
    if device.loss.together is None:
        return "not measured"
    value = f"{device.loss.together:.2f}"
    if device.gain is None:
        return value
    sign = MINUS if device.gain > 0 else "+"
    return f"{value}   {sign}{percent(device.gain)}"


def _loss_note(summary: Summary) -> str:
    gains = [(d.gain, d.name) for d in summary.devices if d.gain is not None]
    if not gains:
        return "Held-out loss of each device; lower is better."
    best, worst = max(gains), min(gains)
    said = f"{best[1]} gains most ({percent(best[0])})" if best[0] > 0 else "No device gains"
    if len(gains) > 1 and worst[0] < 0:
        said += f"; {worst[1]} would do better alone, by {percent(worst[0])}"
    merged = "its own adapter" if summary.is_personal else "merged"
    return f"{said}. Lower is better; the percentage compares {merged} with alone."


def _memory_chart(summary: Summary) -> Chart | None:
    """Return predicted and measured peak beside the budget, all above the runtime's floor."""
    sizes = [
        size
        for device in summary.devices
        for size in (device.predicted_mib, device.peak_mib, device.room_mib)
        if size
    ]
    if not sizes:
        return None
    names = [device.name for device in summary.devices]
    traces: list[Figure] = []
    notes: list[Figure] = []
    for index, device in enumerate(summary.devices):
        traces += _memory_row(index, device)
        notes += row_annotations(index, device.name, _memory_value(device), len(names))
    figure = {
        "data": traces,
        "layout": rows_layout(names, _memory_axis(sizes), notes),
    }
    key = (
        ("predicted", f"predicted, ±{percent(MEMORY_BAND)}"),
        ("merged", "measured peak"),
        ("budget", "budget"),
    )
    return Chart("memory", "Memory, predicted and measured", _memory_note(summary), figure, key=key)


def _memory_axis(sizes: Sequence[float]) -> Figure:
    low, high = min(sizes), max(sizes)
    if high / low < LOG_FROM:
        return axis("MiB above the runtime's floor", range=[0, high * 1.08], nticks=6)
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    step = math.ceil(len(powers) / 7)
    ticks = [2.0**power for power in powers][::step]
    return axis(
        "MiB above the runtime's floor, in doublings",
        type="log",
        range=[math.log10(low * 0.7), math.log10(high * 1.25)],
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )


def _memory_row(index: int, device: DeviceSummary) -> list[Figure]:
    predicted, peak, room = device.predicted_mib, device.peak_mib, device.room_mib
    named = {"predicted": predicted, "measured": peak, "budget": room}
    lines = [f"{label} {mib:,.0f} MiB" for label, mib in named.items() if mib is not None]
    if device.peak_share is not None:
        lines.append(f"measured is {percent(device.peak_share)} of predicted")
    if device.floor_mib is not None:
        lines.append(f"above a floor of {device.floor_mib:,.0f} MiB")
    text = hover(device.name, *lines)
    colour = device_colour(index)
    traces = []
    if predicted:
        ends = [predicted * (1 - MEMORY_BAND), predicted * (1 + MEMORY_BAND)]
        traces.append(_line(index, ends, text, color=device_colour(index, 0.22), width=14))
        traces += _tick(index, predicted, text, colour, 10)
    traces += _tick(index, room, text, "$ink", 12)
    ring = {"color": "$paper", "width": 1.5}
    traces += _dot(index, peak or None, text, size=11, color=colour, line=ring)
    return traces


def _memory_value(device: DeviceSummary) -> str:
    peak = EN_DASH if device.peak_mib is None else f"{device.peak_mib:,.0f}"
    if device.room_mib is None:
        return f"{peak} MiB"
    return f"{peak} of {device.room_mib:,.0f} MiB"


def _memory_note(summary: Summary) -> str:
    checked = [d.memory_as_predicted for d in summary.devices if d.memory_as_predicted is not None]
    shares = {d.name: d.budget_share for d in summary.devices if d.budget_share is not None}
    over = [name for name, share in shares.items() if share > 1]
    said = []
    if checked:
        within = f"{sum(checked)} of {len(checked)}"
        said.append(f"{within} peaks within {percent(MEMORY_BAND)} of the prediction.")
    if over:
        said.append(f"Over budget: {some_of(over)}.")
    elif shares:
        said.append("No measured peak is over its budget.")
    return " ".join(said)


def _traffic_chart(summary: Summary) -> Chart | None:
    """Return the bytes each device sent and received."""
    if not any(device.bytes_up or device.bytes_down for device in summary.devices):
        return None
    names = [device.name for device in summary.devices]
    traces: list[Figure] = []
    notes: list[Figure] = []
    for index, device in enumerate(summary.devices):
        traces += _traffic_row(index, device, len(names))
        up, down = human_bytes(device.bytes_up), human_bytes(device.bytes_down)
        notes += row_annotations(index, device.name, f"↑ {up}   ↓ {down}", len(names))
    xaxis = _bytes_axis(max(max(d.bytes_up, d.bytes_down) for d in summary.devices))
    figure = {
        "data": traces,
        "layout": rows_layout(names, xaxis, notes) | {"barmode": "overlay"},
    }
    key = (("up", "sent"), ("down", "received"))
    return Chart("traffic", "Bytes up and down", _traffic_note(summary), figure, key=key)


def _traffic_row(index: int, device: DeviceSummary, count: int) -> list[Figure]:
    """Return two bars, sent above received."""
    text = hover(
        device.name,
        f"sent {human_bytes(device.bytes_up)}",
        f"received {human_bytes(device.bytes_down)}",
    )
    above, below, width = (-0.02, 0.16, 0.16) if count <= COLOURS else (-0.17, 0.17, 0.3)
    bars = ((device.bytes_up, above, None), (device.bytes_down, below, 0.38))
    return [
        {
            "type": "bar",
            "orientation": "h",
            "x": [size],
            "y": [index + place],
            "width": [width],
            "marker": {"color": device_colour(index, opacity), "line": {"width": 0}},
            "hoverinfo": "text",
            "hovertext": [text],
            "meta": {"device": index},
        }
        for size, place, opacity in bars
    ]


def _bytes_axis(high: int) -> Figure:
    """Return an axis of bytes from 0 to `high`, with three to six round marks."""
    power = 10 ** math.floor(math.log10(high / 2))
    step = next(n * power for n in (1, 2, 5, 10) if high / (n * power) <= 6)
    ticks = [step * n for n in range(int(high // step) + 1)]
    scale, unit = next(
        (10**p, u)
        for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "B"))
        if step >= 10**p or p == 0
    )
    return axis(
        "bytes in all rounds",
        tickvals=ticks,
        ticktext=[f"{tick / scale:g} {unit}" if tick else "0" for tick in ticks],
        range=[0, high * 1.04],
    )


def _traffic_note(summary: Summary) -> str:
    sent = [device.bytes_up for device in summary.devices if device.bytes_up]
    if len(sent) < 2:
        return "Adapters travel, text does not."
    ratio = max(sent) / min(sent)
    return (
        "Adapters travel, text does not. "
        f"The largest sender sends {ratio:.2g} times as much as the smallest."
    )
