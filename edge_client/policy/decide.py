"""May a device train, and may it transfer, as its owner has it? Pure: all that counts comes in.

A limit that has been passed holds until it is kept by a margin, so that a device at the edge of one
does not begin and stop all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from device_profiles.schema import Power
from edge_client.policy.hours import is_within, next_start
from edge_client.policy.owner import Policy

BATTERY_MARGIN = 5.0
"""Percent above its limit that a battery has to come to."""
HEAT_MARGIN_C = 5.0
LOAD_MARGIN = 0.8
"""Share of its limit that the load of others has to fall to."""
BYTES_PER_MIB = 2**20

Activity = Literal["train", "transfer"]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """How the device is now; None is unknown, and holds nothing up."""

    power: Power = field(default_factory=Power)
    temperature_c: float | None = None
    others_load: float | None = None
    """Share of all cores that others use, 0 to 1."""
    metered: bool | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """What of today is used up."""

    bytes: int = 0
    """Up and down together."""
    training_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why not now."""

    kind: str
    detail: str
    """In words: how it is, and what would end the wait; the broker is told it too."""
    wants_memory: bool = False
    """Whether the training process is to end meanwhile, and give its memory back."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What speaks against training and against transferring; nothing: it may."""

    train: tuple[Reason, ...] = ()
    transfer: tuple[Reason, ...] = ()

    def against(self, activity: Activity) -> tuple[Reason, ...]:
        return self.train if activity == "train" else self.transfer

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(reason.kind for reason in (*self.train, *self.transfer))


FREE = Decision()


def decide(
    policy: Policy, device: DeviceState, now: datetime, used: Used, before: Decision = FREE
) -> Decision:
    """Decide by what the owner allows, the device's state, its local time and what is used.

    `before` is the last decision: what held the device up then does so until a margin is kept.
    """
    held = before.kinds
    return Decision(
        tuple(_against_training(policy, device, now, used, held)),
        tuple(_against_transfer(policy, device, used)),
    )


def _against_training(
    policy: Policy, device: DeviceState, now: datetime, used: Used, held: frozenset[str]
) -> Iterator[Reason]:
    if reason := _battery(policy, device.power, "battery" in held):
        yield reason
    limit_c, heat_c = policy.temperature_below, device.temperature_c
    if limit_c is not None and heat_c is not None:
        goal_c = limit_c - HEAT_MARGIN_C
        if heat_c >= (goal_c if "heat" in held else limit_c):
            yield Reason("heat", f"the processor has {heat_c:.0f} °C; until it is below {goal_c:g}")
    limit, load = policy.idle_below, device.others_load
    if limit is not None and load is not None:
        goal = limit * LOAD_MARGIN
        if load >= (goal if "load" in held else limit):
            yield Reason(
                "load",
                f"others use {load:.0%} of the processor; until that is below {goal:.0%}",
            )
    if policy.hours and not is_within(policy.windows, now):
        start = next_start(policy.windows, now)
        yield Reason("hours", f"outside the owner's hours; until {start:%A %H:%M}")
    minutes = policy.minutes_a_day
    if minutes is not None and used.training_s >= 60 * minutes:
        yield Reason("minutes", f"the {minutes:g} minutes of today are used; until midnight")


def _battery(policy: Policy, power: Power, held: bool) -> Reason | None:
    limit, percent = policy.battery_above, power.battery_percent
    on_battery = power.source == "battery" or (power.source == "unknown" and percent is not None)
    if not limit or not on_battery:
        return None
    goal = limit + BATTERY_MARGIN
    if percent is not None and percent > limit and (not held or percent >= goal):
        return None
    level = "on battery" if percent is None else f"the battery is at {percent:.0f} %"
    until = f"mains power, or {goal:g} %" if goal <= 100 and percent is not None else "mains power"
    return Reason("battery", f"{level}; until there is {until}")


def _against_transfer(policy: Policy, device: DeviceState, used: Used) -> Iterator[Reason]:
    if policy.metered == "wait" and device.metered:
        yield Reason("metered", "the network is metered; until there is another")
    mib = policy.mib_a_day
    if mib is not None and used.bytes >= mib * BYTES_PER_MIB:
        yield Reason("bytes", f"the {mib:g} MiB of today are used; until midnight")
