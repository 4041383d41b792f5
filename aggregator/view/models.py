"""The snapshots themselves: plain frozen values, that `dataclasses.asdict` makes JSON of."""

from __future__ import annotations

from dataclasses import dataclass, field

from aggregator.rounds import Policy


@dataclass(frozen=True, slots=True)
class DeviceCounts:
    """How many devices of a job are how. Each is in one of those from `planning` to `offline`."""

    known: int = 0
    online: int = 0
    ready: int = 0
    """Online, able to train, and not kept out: those that rounds are opened and wait for."""
    by_state: dict[str, int] = field(default_factory=dict)
    """State of a device, or "offline" → how many."""
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it stands."""

    name: str
    folder: str
    """Its state folder."""
    rule: str
    base: str
    rank: int
    """Of the shared adapter."""
    ladder: tuple[int, ...]
    state: str
    """"waiting", "open" or "finished"."""
    round: int
    rounds: int
    attempt: int
    version: int
    """The newest; the open round starts from it."""
    deadline: float | None
    """Of the open round; None while the job is paused."""
    paused: float | None
    """Since when; None: it is not."""
    waiting_for: str
    """In words: what has to happen next."""
    policy: Policy
    """What is in force: the job file's, with what was changed while it ran."""
    changed: dict[str, float | int]
    """The part of it that was changed while it ran."""
    devices: DeviceCounts
    delivered: int
    """Updates that count in the open round so far."""
    refused: int
    """Devices that an update was refused of in the open round."""
    up_bytes: int
    """Of all updates that have counted."""
    down_bytes: int
    """Of what these started from, reckoned."""
    process: int | None
    """Of the daemon that serves it now; None: nobody does."""

    @property
    def running(self) -> bool:
        return self.process is not None


@dataclass(frozen=True, slots=True)
class FleetView:
    """All jobs of a daemon's folder."""

    at: float
    jobs: tuple[JobView, ...]
    unreadable: dict[str, str] = field(default_factory=dict)
    """State folder → why it can't be read."""

    @property
    def running(self) -> bool:
        return any(job.running for job in self.jobs)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device in one job, as a row of a list."""

    name: str
    online: bool
    state: str
    """As it said itself last: "idle", "training", …; what it was before it went offline."""
    profile: str
    rank: int
    version: int | None
    """The version that it holds."""
    detail: str
    """What it says of its state, say for what it waits."""
    waiting_for: str
    """In words: why it does not take part now; empty if it does."""
    last_seen: float | None
    """When it last said something new; a device that trains on says nothing for a while."""
    last_round: int | None
    """In which an update of it counted."""
    up_bytes: int
    down_bytes: int
    rounds: int
    """In which an update of it counted."""
    last_error: str
    """Why its last update that was refused was; empty if none was since one counted."""
    quarantined_until: float | None
    """None: it is not kept out."""
    strikes: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class Crowd:
    """A large fleet at a glance."""

    map: str
    """A letter of aggregator.view.crowd.LETTERS for each device, in the order of their names."""
    reasons: dict[str, int]
    """Why devices take no part now → how many; the most frequent reasons first."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """How a device trained the last update that counted, by what its manifest says."""

    round: int
    rank: int
    """After pruning."""
    rank_trained: int
    held: int
    modules: int
    of_modules: int
    """It trained so many modules, of so many."""
    encoding: str
    examples: int
    """Tokens."""
    bytes: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class RoundDevice:
    """What a device did in a round."""

    round: int
    device: str
    counted: bool
    rank: int
    held: int
    up_bytes: int
    down_bytes: int
    loss: float | None
    """Held-out loss of the version it started from, on its own text, in nats a token."""
    refused: int
    """How often an update of it was refused in the round."""
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class DeviceDetail:
    """A device's page: the row, the plan, and its rounds, the newest first."""

    device: DeviceView
    plan: PlanView | None
    key: str
    history: tuple[RoundDevice, ...]


@dataclass(frozen=True, slots=True)
class RoundView:
    """A round that has ended, or is open."""

    number: int
    version: int | None
    """What it came to; None while it is open, or where it ended without a merge."""
    opened: float | None
    ended: float | None
    note: str
    """Why it ended without a merge."""
    merge_s: float | None
    loss: float | None
    """Mean held-out loss of the version it *started* from, over its devices; nats a token."""
    counted: int
    refused: int
    """Devices."""
    ranks: dict[int, int]
    """Rank → devices whose update had it."""
    up_bytes: int
    down_bytes: int
    residual: float | None
    """What the merge could not hold, as a share of the norm."""
    weights: dict[str, float] = field(default_factory=dict)
    """Device → its share; only where one round is asked for."""


@dataclass(frozen=True, slots=True)
class VersionView:
    """A version that is kept."""

    version: int
    parent: int | None
    encoding: str
    bytes: int
    personal: int
    """Devices that have an adapter of their own beside it."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What has come in a job's whole life."""

    counted: int
    """Updates."""
    refused: int
    merge_s: float
    """Of all merges together."""
    merges_within: tuple[int, ...]
    """Merges that took at most so long, for each bound that was asked for, and at last all."""
