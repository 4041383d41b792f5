"""Rows of the table of faults: each does a fault to a running fleet many times, then audits it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.faults import POINTS
from tests.faults.audit import Found
from tests.faults.rig import Blow, Killer, NotRecovered, Rig, Service

AT_FIRST = (
    "aggregator.start.written",
    "aggregator.start.committed",
    "aggregator.round.entered",
)
"""Points that the aggregator passes when a job is new."""
PERSONAL_ALONE = ("aggregator.personal.written", "aggregator.personal.published")
"""Points that only jobs with personal adapters pass."""
ONCE_A_LIFE = "aggregator.start."
OFTEN = (
    "aggregator.chunk.",
    "aggregator.message",
    "device.chunk.",
    "aggregator.version.publishing",
)
"""Points that are passed several times a round."""
HEARD_S = 60.0
"""What has to be said has been said by then."""

Happened = Callable[[], bool]


@dataclass
class Row:
    """What came of one fault."""

    fault: str
    tried: int = 0
    kills: int = 0
    """SIGKILLs and SIGTERMs among them."""
    sent: int = 0
    once: int = 0
    twice: int = 0
    lost: int = 0
    worst_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, found: Found) -> None:
        """Add what an audit came to."""
        self.sent, self.once = self.sent + found.sent, self.once + found.once
        self.twice, self.lost = self.twice + found.twice, self.lost + found.lost
        self.problems += found.problems


@dataclass(frozen=True)
class Fault:
    """A row to be made: what it is called, and what does it."""

    name: str
    strike: Callable[[Rig, Row, int], None]
    times: int
    """How often, in the long form."""

    def run(self, rig: Rig, times: int) -> Row:
        """Strike, let a round pass, audit.

        The aggregator starts anew first: rounds of a second use up the messages that it allows a
        device on and on, and what it then drops a device offers again 30 s later.
        """
        row = Row(self.name)
        try:
            rig.restart(rig.aggregator)
            self.strike(rig, row, times)
            rig.wait_for_rounds(1)
        except NotRecovered as error:
            row.problems.append(f"the fleet stands still: {error}")
        row.add(rig.auditor.audit())
        for service in rig.services:
            row.problems += service.complaints()
        return row


def expect(rig: Rig, row: Row, happened: Happened, what: str) -> None:
    """Keep a fleet up until something has happened, which it has to before long."""
    deadline = time.monotonic() + HEARD_S
    rig.keep_up(lambda: happened() or time.monotonic() > deadline)
    if not happened():
        row.problems.append(f"{what}: not in {HEARD_S:.0f} s")


def kill(row: Row, rig: Rig, blows: dict[Service, Sequence[Blow]]) -> None:
    """Deal blows to several services side by side and note recoveries."""
    killers = [Killer(rig, service, each) for service, each in blows.items()]
    try:
        rig.run(killers)
    finally:
        row.tried += sum(k.dealt for k in killers)
        row.kills += sum(k.dealt for k in killers)
        row.worst_s = max([row.worst_s, *(s for k in killers for s in k.recoveries)])


def at_point(point: str) -> Callable[[Rig, Row, int], None]:
    """Return what kills the aggregator, or all devices, at a fault point."""

    def strike(rig: Rig, row: Row, times: int) -> None:
        def blows(count: int) -> list[Blow]:
            most = 1 if point.startswith(ONCE_A_LIFE) else 12 if point.startswith(OFTEN) else 2
            if point.startswith("device.chunk."):
                most = 4
            return [Blow(f"{point}:{rig.random.randint(1, most)}") for _ in range(count)]

        if point.startswith("device."):
            each = -(-times // len(rig.devices))
            kill(row, rig, {device: blows(each) for device in rig.devices.values()})
        else:
            kill(row, rig, {rig.aggregator: blows(times)})

    return strike


def before_anybody(point: str) -> Callable[[Rig, Row, int], None]:
    """Return what kills an aggregator that has never run before, and has it begin again."""

    def strike(rig: Rig, row: Row, times: int) -> None:
        for _ in range(times):
            row.tried, row.kills = row.tried + 1, row.kills + 1
            row.add(rig.auditor.audit())  # of the fleet that ends here
            row.worst_s = max(row.worst_s, rig.begin(point))

    return strike


def at_random(
    *names: str, number: int = signal.SIGKILL, most_s: float = 1.5
) -> Callable[[Rig, Row, int], None]:
    """Return what ends services at random instants, side by side; "devices" are all of them."""

    def strike(rig: Rig, row: Row, times: int) -> None:
        services = [s for s in rig.services if s.name in names]
        if "devices" in names:
            services += rig.devices.values()
        each = -(-times // len(services))
        kill(
            row,
            rig,
            {
                service: [
                    Blow(after_s=rig.random.uniform(0.01, most_s), number=number)
                    for _ in range(each)
                ]
                for service in services
            },
        )

    return strike


def personal_points() -> list[Fault]:
    """Return a fault for each named point that only jobs with personal adapters pass."""
    return [Fault(point, at_point(point), 8) for point in PERSONAL_ALONE]


def every_point() -> list[Fault]:
    """Return a fault for each named point that a job with a common adapter passes."""
    faults = []
    for point in POINTS:
        if point in PERSONAL_ALONE:
            continue
        if point in AT_FIRST:
            faults.append(Fault(point, before_anybody(point), 5))
        else:
            faults.append(Fault(point, at_point(point), 12 if point.startswith("device.") else 8))
    return faults


def random_instants() -> list[Fault]:
    return [
        Fault("aggregator kill -9", at_random("aggregator"), 40),
        Fault("aggregator SIGTERM", at_random("aggregator", number=signal.SIGTERM), 10),
        Fault("devices kill -9", at_random("devices"), 60),
        Fault("broker kill -9", at_random("broker"), 30),
        Fault("broker SIGTERM", at_random("broker", number=signal.SIGTERM), 10),
        Fault("all of them kill -9", at_random("broker", "aggregator", "devices", most_s=3), 50),
    ]
