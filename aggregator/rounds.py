"""When a round opens, merges, waits on, and when a job is finished. Pure: no clock, no store.

waiting ──enough devices──▶ open ──all of the cohort, or deadline with a quorum──▶ merge
                             ▲ └──deadline without a quorum, or nobody──┐               │
                             │    more to wait for in the cohort        │               │
                             │        ◀────────── extend ───────────────┘               │
                             └──────────────────next round──────────────────────────────┘

An extension is a new attempt at the same round: more of the fleet is asked, and who was refused is
asked once more. What has been counted stays counted.

Buffered, a round is one filling of the buffer: it is merged as soon as `buffer` updates count in
it, whatever versions they started from, and otherwise as above, so that a buffer larger than the
fleet waits for nobody who has delivered already. Source: FedBuff, arXiv 2106.06639.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from protocol.cohort import in_cohort
from protocol.messages import UploadManifest

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
    buffer: int = 0
    """Updates after which a buffered round is merged; 0: rounds are synchronous."""
    max_staleness: int = 8
    """Versions by which an update may be behind and still count in a buffered round."""

    @property
    def behind(self) -> int:
        """Versions by which an update may be behind the open round's and still count."""
        return self.max_staleness if self.buffer else self.late_updates

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


@dataclass(slots=True)
class Answers:
    """Hold who has answered in a round, kept up as updates are counted."""

    number: int
    refused: set[str] = field(default_factory=set)
    """Devices whose update of this attempt was refused."""
    updates: set[str] = field(default_factory=set)
    """Uploads that count in the round."""
    devices: set[str] = field(default_factory=set)
    """Whose they are."""
    trained: set[str] = field(default_factory=set)
    """Devices whose update is of this round, and not of an earlier one."""

    def add(self, manifest: UploadManifest) -> None:
        """Count an update in the round; the same one may be added again."""
        self.updates.add(manifest.upload)
        self.devices.add(manifest.device)
        if manifest.round == self.number:
            self.trained.add(manifest.device)

    def delivered(self, policy: Policy) -> set[str]:
        """Return who need not be waited for, of the devices whose updates count.

        In a buffered round a device that has delivered for an older version trains on, from this.
        """
        return self.trained if policy.buffer else self.devices


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
    buffered: int = 0,
) -> Action | None:
    """Return what is to be done, or None to wait on.

    `online` are the devices that can take part, `delivered` those whose update has been counted
    in this round (of a buffered one, those that have trained from its version), `refused` those
    whose update of this attempt will not be. `buffered` is how many updates count in it.
    """
    if now.state == "finished":
        return None
    if now.state == "waiting":
        if now.number >= rounds:
            return "finish"
        return "open" if len(online) >= policy.min_devices else None
    share = policy.share(now.attempt)
    if policy.buffer and buffered >= policy.buffer:
        return "merge"
    answered = {*delivered, *refused}
    # Asked with each message, of all the fleet: it ends at the first who has not answered.
    heard_all = not any(
        device not in answered and in_cohort(device, job, now.number, share) for device in online
    )
    late = now.deadline is not None and time_s >= now.deadline
    if max(len(delivered), buffered) >= policy.quorum:
        return "merge" if heard_all or late else None
    if late:
        return "extend"
    others = heard_all and any(not in_cohort(d, job, now.number, share) for d in online)
    return "extend" if others else None


def wanted_no_more(
    manifest: UploadManifest,
    now: RoundState,
    policy: Policy,
    *,
    another_counts: Callable[[], bool],
    was_left: Callable[[], bool],
    is_kept: Callable[[int], bool],
) -> str:
    """Say why an upload does not count now, through no fault of it; empty if it does.

    `another_counts` says whether another update of the device counts in the open round, `was_left`
    whether what its round began from was left for an older version, `is_kept` whether a version is.
    """
    behind = now.number - manifest.round
    if behind < 0:
        return f"round {manifest.round} has not begun (it is round {now.number}, {now.state})"
    if now.state == "open" and policy.buffer and behind > policy.behind:
        return f"it is {behind} versions behind, and an update counts up to {policy.behind} behind"
    if now.state != "open" or behind > policy.behind:
        return f"round {manifest.round} is over (it is round {now.number}, {now.state})"
    if behind and not policy.buffer and another_counts():
        return f"another update of this device counts in round {now.number} already"
    if not behind and manifest.attempt > now.attempt:
        return f"attempt {manifest.attempt} at round {now.number} has not begun"
    if manifest.version != (started := now.version - behind):
        return f"it starts from version {manifest.version}, the round from {started}"
    if behind and was_left():
        return f"what round {manifest.round} began from has been left for an older version"
    if behind and not is_kept(started):
        return f"version {started}, from which it starts, is not kept any more"
    return ""
