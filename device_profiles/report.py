"""Write the page that a replay ends with: one HTML file that needs nothing beside it.

The page is report_page.html with its style, of which the aggregator's live page has a part too, its
script and plotly.js filled in; a content security policy in it forbids every request. Text from the
summary is escaped wherever it stands.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from device_profiles.report_figure import (
    COLOURS,
    EN_DASH,
    Chart,
    count_of,
    device_dash,
    percent,
)
from device_profiles.report_rounds import round_charts
from device_profiles.report_rows import row_charts
from device_profiles.report_trust import trust_charts
from device_profiles.summary import (
    MEMORY_BAND,
    DeviceSummary,
    Losses,
    Summary,
    gain,
    rank_path,
    read_summary,
)
from protocol.human import human_bytes, human_seconds

LEVEL = 0.005
"""A difference in loss smaller than this share is called level."""
ORDER = ("loss-rounds", "loss-devices", "memory", "traffic", "ranks", "weights", "trust")
"""Order of the charts on the page."""
DASH_ARRAYS = {"solid": "none", "dash": "5 3", "dot": "1.5 3", "dashdot": "6 3 1.5 3"}
"""Dashes of plotly.js as SVG draws them; any other is a long dash."""


def write_report(summary: Summary | Mapping[str, Any], path: Path) -> None:
    """Write the report of a replay to `path`, one HTML file of about 5 MB.

    Raises:
        pydantic.ValidationError: the summary is not of the form of `Summary`.
        OSError: the file cannot be written.
    """
    path.write_text(render_report(read_summary(summary)), encoding="utf-8")


def render_report(summary: Summary) -> str:
    """Return the report as HTML."""
    from plotly.offline import get_plotlyjs  # heavy: only the report needs it

    found = (*round_charts(summary), *row_charts(summary), *trust_charts(summary))
    charts = sorted(found, key=lambda chart: ORDER.index(chart.slug))
    return _fill(
        _part("html"),
        {
            "title": html.escape(f"Tunefleet: {headline(summary)}"),
            "style": _shared_look() + _part("css"),
            "eyebrow": html.escape(_eyebrow(summary)),
            "headline": html.escape(headline(summary)),
            "lede": html.escape(_lede(summary)),
            "tiles": "\n".join(_tiles(summary)),
            "many": " many" if len(summary.devices) > 12 else "",
            "devices": "\n".join(map(_device_button, range(len(summary.devices)), summary.devices)),
            "empty": "" if summary.history else '<p class="empty">No round was recorded.</p>',
            "charts": "\n".join(map(_figure, charts)),
            "table": _table(summary),
            "settings": "\n".join(_settings(summary)),
            "figures": _json({chart.slug: chart.figure for chart in charts}),
            "plotly": get_plotlyjs(),
            "script": _part("js"),
        },
    )


def _shared_look() -> str:
    """Return the style that the aggregator's live page has too."""
    return (files("aggregator.page") / "static" / "look.css").read_text(encoding="utf-8")


def _part(suffix: str) -> str:
    return Path(__file__).with_name(f"report_page.{suffix}").read_text(encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Return `template` with each {{name}} replaced; what is filled in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _json(value: Any) -> str:
    """Return JSON that can stand inside a script element: it holds no "<", "&" or ">"."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def headline(summary: Summary) -> str:
    """Return in one sentence what the replay showed, whether or not merging won."""
    loss = summary.mean_loss
    subject = count_of(len(summary.devices), "device")
    ranks = _ranks(summary)
    if ranks:
        subject += f", {'ranks' if EN_DASH in ranks else 'rank'} {ranks}"
    if loss.together is None:
        return f"{subject}: no merged loss was measured"
    if loss.local is not None:
        comparison = _compared(gain(loss.local, loss.together), "training alone")
    elif loss.base is not None:
        comparison = _compared(gain(loss.base, loss.together), "the base model")
    else:
        comparison = "with nothing to compare it to"
    return f"{subject}: {_merged(summary)} {loss.together:.2f} nats/token, {comparison}"


def _merged(summary: Summary) -> str:
    """Return what the devices end with, in a word."""
    return "personal" if summary.is_personal else "merged"


def _compared(share: float | None, to: str) -> str:
    if share is None or abs(share) < LEVEL:
        return f"level with {to}"
    return f"{percent(share)} {'below' if share > 0 else 'above'} {to}"


def _ranks(summary: Summary) -> str:
    """Return the span of ranks, one rank, or "": what the devices began and ended with."""
    known = {r for d in summary.devices for r in (d.rank_start, d.rank_end) if r is not None}
    if not known:
        return ""
    return EN_DASH.join(str(rank) for rank in sorted({min(known), max(known)}))


def _eyebrow(summary: Summary) -> str:
    words = ["Tunefleet replay"]
    if summary.rule:
        words.append(f"merged by {summary.rule}")
    if summary.base_model:
        words.append(summary.base_model)
    return " · ".join(words)


def _lede(summary: Summary) -> str:
    """Return what stands under the headline: who gained, who lost, and from where all began."""
    loss = summary.mean_loss
    gains = [device.gain for device in summary.devices if device.gain is not None]
    said = []
    if gains:
        better = sum(share > 0 for share in gains)
        said.append(
            f"With merging, {better} of {count_of(len(gains), 'device')} "
            f"{'ends' if better == 1 else 'end'} with a lower held-out loss than with the same "
            "training alone."
        )
    if summary.is_personal and loss.merged is not None:
        common = _compared(gain(loss.merged, loss.together), "the common one")
        said.append(f"Adapters of their own stand {common} ({loss.merged:.2f}).")
    overall = gain(loss.local, loss.together)
    if overall is not None and overall <= -LEVEL:
        said.append("On average, merging did not pay here.")
    across = summary.across
    if across.local is not None and across.merged is not None:
        compared = _compared(gain(across.local, across.merged), "adapters trained alone")
        said.append(
            f"Across the whole fleet's text the merged adapter stands {compared} "
            f"({across.merged:.2f} against {across.local:.2f})."
        )
    if loss.base is not None and loss.merged is not None:
        change = _compared(gain(loss.base, loss.merged), "the base model")
        said.append(f"The merged adapter stands {change} ({loss.base:.2f}).")
    held = loss.merged_on_device
    if held is not None and loss.merged is not None and abs(held - loss.merged) >= 0.005:
        said.append(f"Cut to the rank each device holds, it reaches {held:.2f}.")
    return " ".join(said)


def _tiles(summary: Summary) -> Iterable[str]:
    """Yield the key figures, each a small tile."""
    loss = summary.mean_loss
    gains = [device.gain for device in summary.devices if device.gain is not None]
    peaks = [d.memory_as_predicted for d in summary.devices if d.memory_as_predicted is not None]
    up = sum(device.bytes_up for device in summary.devices)
    down = sum(device.bytes_down for device in summary.devices)
    tokens = sum(device.tokens for device in summary.devices)
    merges = [entry.merge_s for entry in summary.history if entry.merge_s is not None]
    rounds = len(summary.history) if summary.rounds is None else summary.rounds
    wall = EN_DASH if summary.wall_s is None else human_seconds(summary.wall_s)
    better = f"{sum(share > 0 for share in gains)} of {len(gains)}" if gains else EN_DASH
    within = f"{sum(peaks)} of {len(peaks)}" if peaks else EN_DASH
    budgets = [d.budget_share for d in summary.devices if d.budget_share is not None]
    over = sum(share > 1 for share in budgets)
    kept = f", {over or 'none'} over budget" if budgets else ""
    took = f", {human_seconds(median(merges))} a merge" if merges else ""
    others = {"alone": loss.local, "common": loss.merged, "base": loss.base}
    if not summary.is_personal:
        del others["common"]
    detail = ", ".join(f"{name} {_loss(value)}" for name, value in others.items())
    yield _tile(f"{_merged(summary).capitalize()} loss", _loss(loss.together), detail)
    yield _tile("Better off merged", better, "devices, against training alone")
    yield _tile("Peaks as predicted", within, f"within ±{percent(MEMORY_BAND)}{kept}")
    yield _tile(
        "Over the wire", human_bytes(up + down), f"{human_bytes(up)} up, {human_bytes(down)} down"
    )
    yield _tile("Trained on", _short(tokens), "tokens, all devices and rounds")
    yield _tile("Wall time", wall, f"{count_of(rounds, 'round')}{took}")


def _tile(term: str, value: str, detail: str) -> str:
    term, value, detail = html.escape(term), html.escape(value), html.escape(detail)
    return (
        f'<div><dt>{term}</dt><dd class="value">{value}</dd><dd class="detail">{detail}</dd></div>'
    )


def _loss(value: float | None) -> str:
    return EN_DASH if value is None else f"{value:.2f}"


def _short(count: int) -> str:
    """Return a count with two or three figures: "940", "18 k", "1.2 M"."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return str(count)


def _device_button(index: int, device: DeviceSummary) -> str:
    """Return the button that names a device in its colour and brings it to the front."""
    colour = f"var(--d{index % COLOURS})"
    if index < COLOURS:
        glyph = f'<i style="background:{colour}"></i>'
    else:
        dashes = DASH_ARRAYS.get(device_dash(index), "9 4")
        glyph = (
            '<svg aria-hidden="true"><line x1="0" y1="5" x2="22" y2="5" stroke-width="2.5" '
            f'style="stroke:{colour}" stroke-dasharray="{dashes}"/></svg>'
        )
    title = html.escape(" · ".join(filter(None, (device.title, device.text))))
    return (
        f'<button type="button" data-device="{index}" aria-pressed="false" title="{title}">'
        f"{glyph}{html.escape(device.name)}</button>"
    )


def _figure(chart: Chart) -> str:
    key = "".join(
        f'<li><i class="{glyph}"></i>{html.escape(meaning)}</li>' for glyph, meaning in chart.key
    )
    return (
        f'<figure class="span{chart.span}"><figcaption><h2>{html.escape(chart.title)}</h2>'
        f'<p class="note">{html.escape(chart.note)}</p></figcaption>'
        + (f'<ul class="key">{key}</ul>' if key else "")
        + f'<div class="plot" id="{chart.slug}" role="img" '
        f'aria-label="{html.escape(chart.title)}; the table below has the figures" '
        f'style="min-height:{chart.figure["layout"]["height"]}px"></div></figure>'
    )


def _headings(summary: Summary) -> list[str]:
    """Return the table's headings: losses first, what a narrow screen shows without scrolling."""
    own = ["Its own"] if summary.is_personal else []
    losses = ["Base", "Alone", "Merged", *own, "At its rank"]
    return ["Device", *losses, "Rank", "Predicted MiB", "Measured MiB", "Budget MiB", "Up", "Down"]


def _table(summary: Summary) -> str:
    """Return the table of all devices with their mean below; each row's best loss is bold."""
    headings, own = _headings(summary), summary.is_personal
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    words = len(headings) - 1
    rows = (_table_rows(n, device, words, own) for n, device in enumerate(summary.devices))
    bodies = "\n".join(rows)
    up = human_bytes(sum(device.bytes_up for device in summary.devices))
    down = human_bytes(sum(device.bytes_down for device in summary.devices))
    foot = (
        '<th scope="row">Mean<small>bytes: all together</small></th>'
        f"{_loss_cells(summary.mean_loss, own)}{'<td></td>' * 4}<td>{up}</td><td>{down}</td>"
    )
    return (
        f"<table><thead><tr>{head}</tr></thead>\n{bodies}\n<tfoot><tr>{foot}</tr></tfoot></table>"
    )


def _table_rows(index: int, device: DeviceSummary, columns: int, own: bool) -> str:
    """Return a device's figures and, below them over all columns, its text and plan."""
    profile = html.escape(device.title or device.profile)
    words = html.escape(" · ".join(filter(None, (device.text, device.plan))))
    return (
        f'<tbody><tr><th scope="row" rowspan="2"><i style="background:var(--d{index % COLOURS})">'
        f"</i>{html.escape(device.name)}<small>{profile}</small></th>"
        f"{_loss_cells(device.loss, own)}<td>{rank_path(device)}</td>{_memory_cells(device)}"
        f"<td>{human_bytes(device.bytes_up)}</td><td>{human_bytes(device.bytes_down)}</td></tr>\n"
        f'<tr><td class="words" colspan="{columns}"><p>{words}</p></td></tr></tbody>'
    )


def _memory_cells(device: DeviceSummary) -> str:
    """Return predicted peak, measured peak (a share of it below), budget (the share taken)."""
    late = ' class="late"'
    missed = device.memory_as_predicted is False
    over = device.budget_share is not None and device.budget_share > 1
    return (
        f"<td>{_mib(device.predicted_mib)}</td>"
        f"<td{late if missed else ''}>{_mib(device.peak_mib)}{_share(device.peak_share)}</td>"
        f"<td{late if over else ''}>{_mib(device.room_mib)}"
        f"{_share(device.budget_share, 'over: ' if over else '')}</td>"
    )


def _share(share: float | None, word: str = "") -> str:
    return "" if share is None else f"<small>{word}{percent(share)}</small>"


def _mib(value: float | None) -> str:
    return EN_DASH if value is None else f"{value:,.0f}"


def _loss_cells(loss: Losses, own: bool) -> str:
    personal = [loss.personal] if own else []
    values = (loss.base, loss.local, loss.merged, *personal, loss.merged_on_device)
    best = min((value for value in values if value is not None), default=None)
    cells = []
    for value in values:
        text = EN_DASH if value is None else f"{value:.3f}"
        is_best = value is not None and value == best
        cells.append(f"<td><b>{text}</b></td>" if is_best else f"<td>{text}</td>")
    return "".join(cells)


def _settings(summary: Summary) -> Iterable[str]:
    """Yield the settings that are known, each a term and its value."""
    parameters = summary.base_parameters
    named = {
        "Rule": summary.rule,
        "Base model": summary.base_model,
        "Base parameters": None if parameters is None else f"{parameters:,}",
        "Ladder of ranks": ", ".join(map(str, summary.ladder)),
        "Greatest rank": summary.rank_max,
        "Directions trained": summary.directions,
        "Directions above a rank": summary.remainder,
        "Memory scale": None if summary.memory_scale is None else f"{summary.memory_scale:g}",
        "Broker": summary.broker,
        "Rounds": summary.rounds,
        "Seed": summary.seed,
        "Wall time": None if summary.wall_s is None else human_seconds(summary.wall_s),
    }
    for term, value in named.items():
        if value is not None and value != "":
            yield f"<div><dt>{term}</dt><dd>{html.escape(str(value))}</dd></div>"
