"""What an operator changes while a job is served: paused or not, and how rounds are run. Pure.

It is kept with the job's state, apart from the job file: it holds over restarts, until it is taken
back. What the file says is in force where nothing was changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from aggregator.rounds import Policy, RoundState

CHANGEABLE = ("deadline_s", "quorum", "min_devices", "fraction")
"""Settings of a job's policy that a command may change."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What was changed."""

    paused: float | None = None
    """Since when, in seconds since 1970; None: it is not."""
    changed: dict[str, float | int] = field(default_factory=dict)
    """Setting → its value."""

    def policy(self, file: Policy) -> Policy:
        """Return the policy that is in force, of what the job file says."""
        return Policy(**{**asdict(file), **self.changed})

    def in_force(self, file: Policy) -> Policy:
        """Return the policy that rounds go by: of a job that is paused, nobody is asked.

        Who trains already goes on, and what comes is counted.
        """
        policy = self.policy(file)
        return policy if self.paused is None else replace(policy, fraction=0.0)


def resumed(now: RoundState, steering: Steering, time_s: float) -> tuple[RoundState, Steering]:
    """Return the round and what is kept of a job that goes on: it has the time it had left."""
    assert steering.paused is not None, "it is paused"
    if now.deadline is not None:
        now = replace(now, deadline=now.deadline + max(0.0, time_s - steering.paused))
    return now, replace(steering, paused=None)


def redirected(
    now: RoundState,
    steering: Steering,
    before: Policy,
    file: Policy,
    settings: Mapping[str, float | int | None],
) -> tuple[RoundState, Steering]:
    """Return round and steering after settings were changed; None takes a change back.

    The open round's deadline moves by as much as the time that rounds have.
    """
    changed = {k: v for k, v in {**steering.changed, **settings}.items() if v is not None}
    after = replace(steering, changed=changed)
    return moved(now, before, after.policy(file)), after


def moved(now: RoundState, before: Policy, after: Policy) -> RoundState:
    """Return the round with the deadline that it has by another policy."""
    if now.deadline is None or now.state != "open":
        return now
    return replace(now, deadline=now.deadline + after.deadline_s - before.deadline_s)
