"""The charts over rounds: loss, merge time, ranks, traffic. Pure: views in, SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from aggregator.page.charts.frame import (
    HEIGHT_PX,
    Column,
    Scale,
    bar,
    centre,
    frame,
    scale_of,
    stretched,
)
from aggregator.view import RoundView
from protocol.human import human_bytes, human_seconds

Points = Sequence[float | None]
"""A value a round; None where there is none."""
LARGEST = 1e6
"""A loss beyond is no loss of a language model, and would press all others into a line."""
RANK_SHADES = 8
"""Classes of page.css, r0 the lightest."""


def loss_chart(
    rounds: Sequence[RoundView],
    devices: Mapping[str, Points] | None = None,
    band: Sequence[tuple[float, float] | None] = (),
) -> Markup | None:
    """Return held-out loss over rounds: the mean, and a few devices or a band of many beside it.

    None where no round has a loss.
    """
    mean = _believable([view.loss for view in rounds])
    lines = {name: _believable(points) for name, points in (devices or {}).items()}
    band = [edges if edges is None or None not in _believable(edges) else None for edges in band]
    known = [value for line in (mean, *lines.values()) for value in line if value is not None]
    if not known:
        return None
    known += [edge for edges in band if edges is not None for edge in edges]
    scale = scale_of(min(known), max(known))
    marks = [_band(band, scale)]
    marks += [
        _line(points, scale, f"line d{index % 8}") for index, points in enumerate(lines.values())
    ]
    marks.append(_line(mean, scale, "line mean"))
    columns = [
        Column(str(view.number), _loss_tip(view, {name: p[i] for name, p in lines.items()}))
        for i, view in enumerate(rounds)
    ]
    return frame(
        "".join(marks),
        columns,
        scale,
        lambda v: f"{v:.3g}",
        label=f"Held-out loss in {len(rounds)} rounds, from {_ends(mean)} nats a token",
    )


def merge_chart(rounds: Sequence[RoundView]) -> Markup | None:
    """Return how long merging took, a bar a round; None where none was merged."""
    times = [view.merge_s for view in rounds]
    known = [value for value in times if value is not None]
    if not known:
        return None
    scale = scale_of(0, max(known) or 0.001)
    marks = "".join(
        bar(i, len(times), scale.y(value), scale.y(0), "bar")
        for i, value in enumerate(times)
        if value is not None
    )
    columns = [
        Column(
            str(view.number),
            f"round {view.number}\n"
            + (
                "not merged" if view.merge_s is None else f"merged in {human_seconds(view.merge_s)}"
            ),
        )
        for view in rounds
    ]
    label = f"Merge time in {len(known)} rounds, at most {human_seconds(max(known))}"
    return frame(marks, columns, scale, human_seconds, label=label)


def rank_chart(rounds: Sequence[RoundView], shades: Mapping[int, int]) -> Markup | None:
    """Return how many devices delivered each rank, stacked, the smallest below.

    `shades` says which of `RANK_SHADES` each rank has. None where nobody has delivered.
    """
    most = max((sum(view.ranks.values()) for view in rounds), default=0)
    if not most:
        return None
    scale = scale_of(0, most, steps=min(4, most))
    marks = []
    for i, view in enumerate(rounds):
        below = 0
        for rank, devices in sorted(view.ranks.items()):
            top, bottom = scale.y(below + devices), scale.y(below)
            marks.append(bar(i, len(rounds), top, bottom, f"r{shades[rank]}"))
            below += devices
    columns = [Column(str(view.number), _rank_tip(view)) for view in rounds]
    label = f"Ranks that devices delivered in {len(rounds)} rounds"
    return frame("".join(marks), columns, scale, lambda v: f"{v:,.0f}", label=label)


def traffic_chart(rounds: Sequence[RoundView]) -> Markup | None:
    """Return bytes up above the line and bytes down below it; None where none have travelled."""
    up, down = (max((part(v) for v in rounds), default=0) for part in (_up, _down))
    if not up + down:
        return None
    scale = scale_of(-down, up)
    marks = "".join(
        bar(i, len(rounds), scale.y(view.up_bytes), scale.y(0), "bar up") * bool(view.up_bytes)
        + bar(i, len(rounds), scale.y(0), scale.y(-view.down_bytes), "bar down")
        * bool(view.down_bytes)
        for i, view in enumerate(rounds)
    )
    columns = [
        Column(
            str(view.number),
            f"round {view.number}\n{human_bytes(view.up_bytes)} up\n"
            f"{human_bytes(view.down_bytes)} down, reckoned",
        )
        for view in rounds
    ]
    label = f"Bytes up and down in {len(rounds)} rounds"
    return frame(marks, columns, scale, lambda v: human_bytes(abs(v)), label=label)


def shades_of(ranks: Sequence[int]) -> dict[int, int]:
    """Return a shade for each rank, evenly from light to dark."""
    ordered = sorted(set(ranks))
    last = max(len(ordered) - 1, 1)
    return {rank: round(i * (RANK_SHADES - 1) / last) for i, rank in enumerate(ordered)}


def _believable(points: Points) -> Points:
    """Return losses without those that only a broken or hostile device tells."""
    return [v if v is not None and abs(v) <= LARGEST else None for v in points]


def _up(view: RoundView) -> int:
    return view.up_bytes


def _down(view: RoundView) -> int:
    return view.down_bytes


def _line(points: Points, scale: Scale, kind: str) -> str:
    """Return a line through what is known, broken where a round has nothing, with its dots."""
    count = len(points)
    at = [
        None if value is None else (centre(i, count), scale.y(value))
        for i, value in enumerate(points)
    ]
    steps = "".join(f"M{a[0]:g} {a[1]:g}L{b[0]:g} {b[1]:g}" for a, b in pairwise(at) if a and b)
    path = f'<path class="{kind}" d="{steps}" vector-effect="non-scaling-stroke"/>' if steps else ""
    dots = "".join(f'<circle class="{kind}" cx="{p[0]:g}%" cy="{p[1]:g}" r="3"/>' for p in at if p)
    return stretched(path, HEIGHT_PX) + (dots if count <= 60 else "")


def _band(band: Sequence[tuple[float, float] | None], scale: Scale) -> str:
    """Return the area between two lines, over the rounds that have both."""
    at = [(centre(i, len(band)), edges) for i, edges in enumerate(band) if edges is not None]
    if len(at) < 2:
        return ""
    low = [f"{x:g} {scale.y(edges[0]):g}" for x, edges in at]
    high = [f"{x:g} {scale.y(edges[1]):g}" for x, edges in reversed(at)]
    return stretched(f'<path class="band" d="M{"L".join([*low, *high])}Z"/>', scale.height)


def _loss_tip(view: RoundView, devices: Mapping[str, float | None]) -> str:
    said = [f"round {view.number}"]
    said.append("no loss" if view.loss is None else f"{view.loss:.4f} mean")
    said += [f"{loss:.4f} {name}" for name, loss in devices.items() if loss is not None]
    return "\n".join(said)


def _rank_tip(view: RoundView) -> str:
    ranks = [f"rank {rank}: {devices:,}" for rank, devices in sorted(view.ranks.items())]
    return "\n".join([f"round {view.number}", *reversed(ranks)])


def _ends(points: Points) -> str:
    known = [value for value in points if value is not None]
    return f"{known[0]:.3f} to {known[-1]:.3f}" if known else "nothing"
