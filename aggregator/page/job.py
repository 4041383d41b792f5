"""A job's page: what is said of a job, its devices, rounds and versions. Pure but for the view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from markupsafe import Markup

from aggregator.page.asked import ORDERS, PER_PAGE, Asked
from aggregator.page.charts.heat import block_size, heat_map
from aggregator.page.charts.rounds import (
    loss_chart,
    merge_chart,
    rank_chart,
    shades_of,
    traffic_chart,
)
from aggregator.page.page import Link, Page
from aggregator.page.past import Past
from aggregator.page.render import NONE, STATES, loss_words, render
from aggregator.view import DeviceCounts, DeviceView, JobView, RoundView, StateView
from protocol.human import human_bytes, human_seconds

FEW = 60
"""Devices up to which all are on one page, and no map of them is drawn."""
VERSIONS = 20
"""Versions that are shown, the newest."""
LINES = 8
"""Devices up to which each has a line of its own in the chart of losses."""


class Row(NamedTuple):
    """A device in the list."""

    view: DeviceView
    shown: str
    why: str


@dataclass(frozen=True, slots=True)
class Around:
    """What a job's page needs besides the job."""

    enrols: bool = False
    """Whether the aggregator serves a fleet's folder."""
    others: Sequence[str] = ()
    """Names of all jobs here."""


def job_page(state: StateView, past: Past, asked: Asked, around: Around) -> Page:
    """Return a job's page of this moment.

    Raises:
        StoreError: the job's state can't be read.
    """
    with state.snapshot():
        job = state.job()
        rounds = past.rounds(state, job)
        fragments = {
            "head": _head(job),
            "tiles": render("tiles.html", tiles=tiles(job, rounds)),
            "fleet": _fleet(state, job, asked, around),
            "rounds": past.drawn(job.name, rounds, lambda: _rounds(state, past, job, rounds)),
            "trust": _trust(state, past, job),
            "versions": _versions(state, job),
            "steer": render("steer.html", job=job, enrols=around.enrols),
            "settings": render("settings.html", groups=_settings(state.settings())),
        }
    return Page(f"{headline(job)} · {job.name}", fragments, _links(job, around, fragments))


def _links(job: JobView, around: Around, fragments: Mapping[str, Markup]) -> tuple[Link, ...]:
    jobs = [Link(name, f"/jobs/{name}", name == job.name) for name in around.others]
    parts = {
        "fleet": "Fleet",
        "rounds": "Rounds",
        "trust": "Trust",
        "versions": "Versions",
        "steer": "Steer",
        "settings": "Job",
    }
    here = [Link(words, f"#{id}") for id, words in parts.items() if fragments[id]]
    return (*(jobs if len(jobs) > 1 else []), *here)


# -- the head --------------------------------------------------------------------------------------


def headline(job: JobView) -> str:
    """Return in one sentence where a job stands."""
    if job.state == "finished":
        return f"All {job.rounds:,} rounds are merged"
    if job.state == "waiting":
        return "Paused before the first round" if job.paused else "Waiting for the first round"
    word = "is paused" if job.paused else "is open"
    return f"Round {job.round:,} of {job.rounds:,} {word}, {job.delivered:,} delivered"


def _head(job: JobView) -> Markup:
    eyebrow = f"{job.name} · merged by {job.rule} · {job.base}"
    lede = f"Waits for {job.waiting_for}."
    if job.state == "finished":
        lede = "The job is finished."
    elif job.paused:
        lede = "Waits to be resumed; what comes is still counted."
    if not job.running:
        lede += " No aggregator serves it now."
    return render("head.html", eyebrow=eyebrow, headline=headline(job), lede=lede)


def tiles(job: JobView, rounds: Sequence[RoundView]) -> list[tuple[str, str, str]]:
    """Return the key figures: a term, a value, and what stands below it."""
    losses = [view.loss for view in rounds if view.loss is not None]
    merges = [view.merge_s for view in rounds if view.merge_s is not None]
    busy = sum(job.devices.by_state.get(word, 0) for word in ("training", "uploading"))
    out = job.devices.quarantined
    return [
        (
            "Online",
            f"{job.devices.online:,}",
            f"of {job.devices.known:,}, {job.devices.ready:,} ready"
            + f", {out} kept out" * bool(out),
        ),
        ("Training", f"{busy:,}", "or sending what they trained"),
        (
            "Delivered",
            f"{job.delivered:,}",
            f"quorum {job.policy.quorum:,}" + f", {job.refused:,} refused" * bool(job.refused),
        ),
        (
            "Held-out loss",
            loss_words(losses[-1]) if losses else NONE,
            f"from {loss_words(losses[0])}" if len(losses) > 1 else "nats a token",
        ),
        (
            "Merge",
            human_seconds(merges[-1]) if merges else NONE,
            f"median {human_seconds(median(merges))}" if merges else "none yet",
        ),
        (
            "Up and down",
            human_bytes(job.up_bytes + job.down_bytes),
            f"{human_bytes(job.up_bytes)} up, {human_bytes(job.down_bytes)} down",
        ),
    ]


# -- devices ---------------------------------------------------------------------------------------


def shown_state(view: DeviceView) -> str:
    """Return the one word for a device."""
    if view.revoked:
        return "revoked"
    if view.quarantined_until is not None:
        return "quarantined"
    return view.state if view.online else "offline"


def why_not(view: DeviceView) -> str:
    """Return why a device takes no part, where its state does not say that already."""
    why = view.waiting_for
    for said in ("offline", "plans how it will train"):
        if why == said:
            return ""
    return why.removeprefix("waits: ").removeprefix("unfit: ") or view.detail


def _fleet(state: StateView, job: JobView, asked: Asked, around: Around) -> Markup:
    counts = job.devices
    many = counts.known > FEW
    matching = state.count(state=asked.state, search=asked.search)
    pages = max(1, -(-matching // PER_PAGE))
    rows = [Row(view, shown_state(view), why_not(view)) for view in state.devices(**asked.view())]
    first = (asked.page - 1) * PER_PAGE
    crowd = state.crowd() if many else None
    return render(
        "fleet.html",
        base=f"/jobs/{job.name}",
        counts=counts,
        strip=[*strip(counts)],
        states=[(word, n) for word in STATES if (n := counts.by_state.get(word, 0))],
        asked=asked,
        link=asked.link,
        orders=ORDERS.items(),
        many=many,
        map=crowd.map if crowd else "",
        reasons=crowd.reasons.items() if crowd else [],
        devices=rows,
        pages=pages,
        shown=f"{first + 1:,} to {first + len(rows):,} of {matching:,}",
        enrols=around.enrols,
    )


def strip(counts: DeviceCounts) -> Iterable[tuple[str, float, float]]:
    """Yield for each state where its part of a bar begins and how wide it is, in per cent."""
    at = 0.0
    for word in STATES:
        if number := counts.by_state.get(word, 0):
            width = 100 * number / counts.known
            yield word, round(at, 3), round(width, 3)
            at += width


# -- rounds, trust, versions -----------------------------------------------------------------------


def _rounds(state: StateView, past: Past, job: JobView, rounds: Sequence[RoundView]) -> Markup:
    shades = shades_of([rank for view in rounds for rank in view.ranks])
    lines = state.device_losses([view.number for view in rounds], LINES) if rounds else {}
    band = [] if lines else past.spreads(state, job.name, rounds)
    loss_key = [("k-line mean", "mean")]
    loss_key += [("k-box band", "the middle 80 % of devices")] if any(band) else []
    loss_key += [(f"k-line d{index}", name) for index, name in enumerate(lines)]
    left_out = (rounds[0].number - 1) if rounds else 0
    note = "Point at a round, or go through them with the arrow keys, for its figures."
    if left_out > 0:
        note += f" The last {len(rounds)} rounds are shown."
    return render(
        "rounds.html",
        note=note,
        rounds=rounds,
        loss=loss_chart(rounds, lines, band),
        loss_key=loss_key if len(loss_key) > 1 else [],
        merge=merge_chart(rounds),
        ranks=rank_chart(rounds, shades),
        rank_key=[(f"k-box r{shade}", f"rank {rank}") for rank, shade in shades.items()][:24],
        traffic=traffic_chart(rounds),
        traffic_key=[("k-box up", "up"), ("k-box down", "down")],
    )


def _trust(state: StateView, past: Past, job: JobView) -> Markup:
    numbers = state.trust_rounds()
    if not numbers:
        return Markup("")
    last = numbers[-1]
    matrix = past.trust(state, job.name, last)
    size = block_size(len(matrix.devices))
    note = "Of whose adapters (columns, in the order of the rows) each device's own (rows) was "
    note += f"mixed, in per cent, after round {last}."
    if size > 1:
        note += f" Each row stands for {size} devices."
    return past.map_of(
        job.name,
        last,
        lambda: render("trust.html", note=note, chart=heat_map(matrix, last)),
    )


def _versions(state: StateView, job: JobView) -> Markup:
    versions = state.versions()
    personal = any(view.personal for view in versions) or job.rule.startswith("trust-")
    return render(
        "versions.html",
        job=job,
        versions=versions[:VERSIONS],
        left_out=max(0, len(versions) - VERSIONS),
        personal=personal,
    )


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return a job's settings in groups: its own, then each of its tables, by name."""
    tables = {name: table for name, table in settings.items() if isinstance(table, dict) and table}
    own = {name: value for name, value in settings.items() if name not in tables}
    own = {"base": tables.pop("base", {}).get("name"), **own}
    groups = [("", [*_words(own)])]
    return groups + [
        (name.replace("_", " ").capitalize(), [*_words(t)]) for name, t in tables.items()
    ]


def _words(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        term = name.replace("_", " ").capitalize()
        if isinstance(value, list):
            yield term, ", ".join(map(str, value))
        elif value not in (None, {}) and name not in ("protocol", "job"):
            yield term, _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:400]
