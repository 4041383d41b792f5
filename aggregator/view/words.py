"""Why a job or a device waits, in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.rounds import Policy, RoundState


@dataclass(frozen=True, slots=True)
class Cohort:
    """How far the open round is: numbers of devices."""

    ready: int
    asked: int
    """Of the ready ones, those that the round's draw names."""
    delivered: int
    heard: int
    """Of the asked ones, those whose update counts or was refused."""


def job_waits_for(
    state: RoundState, policy: Policy, cohort: Cohort, *, paused: bool, now: float
) -> str:
    """Say what has to happen before a job goes on."""
    if state.state == "finished":
        return "nothing: the job is finished"
    if paused:
        return "to be resumed: the job is paused"
    if state.state == "waiting":
        if cohort.ready >= policy.min_devices:
            return "nothing: the first round opens"
        return f"devices: {cohort.ready} of {policy.min_devices} are ready"
    left = "" if state.deadline is None else f"; {_deadline(state.deadline - now)}"
    if cohort.delivered < policy.quorum:
        return f"updates: {cohort.delivered} of the quorum of {policy.quorum}{left}"
    return f"devices: {cohort.heard} of {cohort.asked} asked have delivered{left}"


def _deadline(left_s: float) -> str:
    if left_s <= 0:
        return "the deadline has passed"
    return f"the deadline is in {duration(left_s)}"


def duration(seconds: float) -> str:
    """Return a time span with one or two units: "45 s", "12 min", "3 h 20 min", "2 d 5 h"."""
    s = int(seconds)
    if s < 120:
        return f"{s} s"
    if s < 2 * 3600:
        return f"{s // 60} min"
    if s < 48 * 3600:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a device, as far as it decides whether it takes part."""

    online: bool
    state: str
    detail: str
    revoked: bool
    quarantined: bool
    drawn: bool
    """Whether the open round's draw names it."""
    delivered: bool
    """Whether an update of it counts in the open round."""


def device_waits_for(device: Standing, state: RoundState, *, paused: bool) -> str:
    """Say why a device does not train or deliver now; empty if it does, or is about to."""
    first = {
        "revoked: it has been put out of the fleet": device.revoked,
        "offline": not device.online,
        "kept out: too much of what it sent was refused": device.quarantined,
        f"unfit: {device.detail or 'it can not train this job'}": device.state == "unfit",
        f"waits: {device.detail or 'its owner does not let it train now'}": device.state
        == "waiting",
        "plans how it will train": device.state == "planning",
    }
    for words, holds in first.items():
        if holds:
            return words
    if state.state == "finished":
        return "the job is finished"
    if state.state == "waiting":
        return "no round is open yet"
    if device.delivered:
        return f"has delivered for round {state.number}"
    if device.state in ("training", "uploading", "downloading"):
        return ""
    if paused:
        return "the job is paused"
    return "" if device.drawn else f"not drawn for round {state.number}"
