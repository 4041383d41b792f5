"""When a round opens, merges, waits on, and when a job is finished. Pure: no clock, no store.

waiting ──enough devices──▶ open ──all of the cohort, or deadline with a quorum──▶ merge
                             ▲ └──deadline without a quorum──▶ extend ──┐               │
                             └───────────────────────────────◀──────────┴──next round──┘
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from protocol.messages import in_cohort

Action = Literal["open", "merge", "extend", "finish"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How rounds are run."""

    min_devices: int = 1
    """Devices that must be online before the first round opens."""
    quorum: int = 1
    """Updates without which a round is not merged."""
    deadline_s: float = 3600.0
    fraction: float = 1.0
    """Share of the fleet that is asked; drawn by a hash of device and round."""
    quarantine_after: int = 5
    """Updates of a device, in a row, that are refused for what they are before it is kept out."""
    quarantine_s: float = 3600.0
    """For how long."""


@dataclass(frozen=True, slots=True)
class RoundState:
    """Where the job stands."""

    number: int
    state: Literal["waiting", "open", "finished"]
    version: int
    deadline: float | None


def next_action(
    now: RoundState,
    policy: Policy,
    *,
    job: str,
    rounds: int,
    time_s: float,
    online: Collection[str],
    delivered: Collection[str],
    refused: Collection[str] = (),
) -> Action | None:
    """Return what is to be done, or None to wait on.

    `online` are the devices that can take part, `delivered` those whose update has been counted
    in this round, `refused` those whose update will not be.
    """
    if now.state == "finished":
        return None
    if now.state == "waiting":
        if now.number >= rounds:
            return "finish"
        return "open" if len(online) >= policy.min_devices else None
    asked = {d for d in online if in_cohort(d, job, now.number, policy.fraction)}
    enough = len(delivered) >= policy.quorum
    if enough and asked <= {*delivered, *refused}:
        return "merge"
    if now.deadline is not None and time_s >= now.deadline:
        return "merge" if enough else "extend"
    return None
