"""A device's page, and the list of jobs where there is more than one."""

from __future__ import annotations

from markupsafe import Markup

from aggregator.page.charts.rounds import loss_chart
from aggregator.page.job import Around, shown_state, why_not
from aggregator.page.page import Link, Page
from aggregator.page.past import Past
from aggregator.page.render import render
from aggregator.view import DeviceDetail, FleetView, StateView

HISTORY = 120
"""Rounds of a device that are shown, the newest."""


def device_page(state: StateView, past: Past, name: str, around: Around) -> Page | None:
    """Return a device's page of this moment; None where there is none of that name.

    Raises:
        StoreError: the job's state can't be read.
    """
    with state.snapshot():
        detail = state.device(name, HISTORY)
        if detail is None:
            return None
        job = state.job()
        view = detail.device
        word, why = shown_state(view), why_not(view)
        fragments = {
            "head": render(
                "head.html",
                eyebrow=f"a device of {job.name}",
                headline=name,
                lede=" · ".join(part for part in (word, why, view.profile) if part),
            ),
            "standing": render(
                "device.html",
                detail=detail,
                view=view,
                shown=word,
                why=why,
                can_revoke=around.enrols and not view.revoked and job.running,
            ),
            "plan": render("plan.html", plan=detail.plan),
            "history": _history(state, past, detail),
        }
        links = (
            Link(job.name, f"/jobs/{job.name}"),
            *(Link(words, f"#{id}") for id, words in PARTS.items()),
        )
        return Page(f"{name} · {job.name}", fragments, links)


PARTS = {"standing": "How it stands", "plan": "Its plan", "history": "Its rounds"}


def _history(state: StateView, past: Past, detail: DeviceDetail) -> Markup:
    rounds = past.rounds(state, state.job())
    own = {one.round: one.loss for one in detail.history}
    line = {detail.device.name: [own.get(view.number) for view in rounds]}
    has_loss = any(loss is not None for loss in own.values())
    return render(
        "history.html",
        history=detail.history,
        chart=loss_chart(rounds, line) if has_loss else None,
        key=[("k-line mean", "mean of the fleet"), ("k-line d0", detail.device.name)],
    )


def jobs_page(fleet: FleetView, root: str) -> Page:
    """Return the list of all jobs."""
    count = len(fleet.jobs)
    online = sum(job.devices.online for job in fleet.jobs)
    headline = f"{count} jobs" if count != 1 else "1 job"
    served = sum(job.running for job in fleet.jobs)
    head = render(
        "head.html",
        eyebrow="Tunefleet",
        headline=f"{headline}, {online:,} devices online" if count else "No job yet",
        lede=f"{served} of them served now." if count else "",
    )
    jobs = render("jobs.html", fleet=fleet, root=root)
    return Page("Tunefleet: jobs", {"head": head, "jobs": jobs})
