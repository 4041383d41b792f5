"""When a round opens, merges, waits on, and when a job is finished. Pure: no clock, no store.

waiting ──enough devices──▶ open ──all of the cohort, or deadline with a quorum──▶ merge
                             ▲ └──deadline without a quorum, or nobody──┐               │
                             │    more to wait for in the cohort        │               │
                             │        ◀────────── extend ───────────────┘               │
                             └──────────────────next round──────────────────────────────┘

An extension is a new attempt at the same round: more of the fleet is asked, and who was refused is
asked once more. What has been counted stays counted.
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
    """Share of the fleet that is asked first; drawn by a hash of device and round."""
    quarantine_after: int = 5
    """Strikes before a device is kept out: one for each update refused for what it is and each
    minute of flooding, one taken back for each update that counts."""
    quarantine_s: float = 3600.0
    """For how long."""
    keep_versions: int = 10
    """Versions that the state keeps, the newest; 0: all."""
    late_updates: int = 0
    """Rounds by which an update may be late and still count, in the round that is open then."""

    def share(self, attempt: int) -> float:
        """Return the share of the fleet that is asked in an attempt; it never falls."""
        return min(1.0, self.fraction * (attempt + 1))


@dataclass(frozen=True, slots=True)
class RoundState:
    """Where the job stands."""

    number: int
    state: Literal["waiting", "open", "finished"]
    version: int
    deadline: float | None
    attempt: int = 0
    """Times the round has been extended."""


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
    in this round, `refused` those whose update of this attempt will not be.
    """
    if now.state == "finished":
        return None
    if now.state == "waiting":
        if now.number >= rounds:
            return "finish"
        return "open" if len(online) >= policy.min_devices else None
    share = policy.share(now.attempt)
    answered = {*delivered, *refused}
    # Asked with each message, of all the fleet: it ends at the first who has not answered.
    heard_all = not any(
        device not in answered and in_cohort(device, job, now.number, share) for device in online
    )
    late = now.deadline is not None and time_s >= now.deadline
    if len(delivered) >= policy.quorum:
        return "merge" if heard_all or late else None
    if late:
        return "extend"
    others = heard_all and any(not in_cohort(d, job, now.number, share) for d in online)
    return "extend" if others else None
