"""Drive virtual devices and the aggregator through virtual time, one instant after the other.

    due events of devices ─▶ real messages ─▶ wait until all are where they go ─▶ more that is due?
            ▲                                                                           │ no
            └──────────── the next instant ◀── the aggregator decides what is due ◀─────┘

Instants lie on a grid. Within one, devices act in their own exact times; the aggregator decides
once at its end, when everything has settled. So what it decides by does not depend on which message
a real broker has carried first, and a run can be repeated to the last bit.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

from device_profiles.errors import ReplayError
from device_profiles.virtual.device import VirtualDevice
from device_profiles.virtual.schedule import Schedule
from device_profiles.virtual.serving import PacedAggregator
from protocol.loop_link import Loop

QUIET_S = 20.0
"""Real time in which nothing has come though something is to: a message is lost."""


class Drive:
    """Drive a replay; `resolution_s` is the grid, `speed` virtual seconds a second (0: at will)."""

    def __init__(
        self,
        loop: Loop,
        schedule: Schedule,
        aggregator: PacedAggregator,
        devices: Sequence[VirtualDevice],
        *,
        epoch_s: float,
        resolution_s: float,
        speed: float = 0.0,
    ) -> None:
        self.now_s = 0.0
        """The instant that is at hand."""
        self.instants = 0
        self._loop, self._schedule, self._aggregator = loop, schedule, aggregator
        self._devices = devices
        self._by_name = {device.settings.name: device for device in devices}
        self._epoch_s, self._resolution_s, self._speed = epoch_s, resolution_s, speed
        self._began = time.monotonic()
        self._active = {device.index for device in devices}
        """Devices that something real may be under way to or from."""
        self._told: Counter[int] = Counter()
        """How often the aggregator has told each device something."""
        self._owing: set[int] = set()
        """Devices that have not got all of that."""
        self._said = ""
        self._settled_at = -1
        """Messages that had been published when all had settled last."""

    @property
    def stands(self) -> dict[str, Any]:
        """Where the job stands, as the aggregator said last."""
        return self._aggregator.stands

    def instant(self) -> bool:
        """Go to the next instant at which anything is due, and through it; False: there is none."""
        due = self._next_s()
        if due is None:
            return False
        self.instants += 1
        step = self._resolution_s
        self.now_s = max(ceil(due / step - 1e-9) * step, self.now_s)
        self._pace()
        reach_s = max(due, self.now_s)  # a sum of floats may lie just beyond the point it is for
        self._settle()  # before the first instant devices have asked to be let in
        while self._act(reach_s):
            self._settle()
        self._decide()
        self._schedule.floor = self.now_s
        return True

    def _next_s(self) -> float | None:
        times = [self._schedule.next_s]
        deadline = self.stands["deadline"]
        if deadline is not None:
            times.append(deadline - self._epoch_s)
        return min((t for t in times if t is not None), default=None)

    def _pace(self) -> None:
        """Wait, hearing what comes, until the virtual clock may be there."""
        while (
            self._speed and (left := self._began + self.now_s / self._speed - time.monotonic()) > 0
        ):
            self._loop.pump(min(left, 0.5))

    def _act(self, until_s: float) -> bool:
        """Have devices do what is due up to a time; say whether anything was.

        A device that is connecting goes on when all have settled: what it does depends on whether
        it is in, and a real broker takes its time to say so.
        """
        acted, kept = False, []
        while (event := self._schedule.take(until_s)) is not None:
            if self._devices[event.device].is_connecting:
                kept.append(event)
                continue
            event.action(event.time_s)
            self._active.add(event.device)
            acted = True
        self._schedule.put_back(kept)
        return acted

    def _settle(self) -> None:
        """Wait until every message is where it goes.

        Raises:
            ReplayError: some do not arrive.
        """
        self._wait(self._devices_settled, self._unsettled)
        if self._loop.published == self._settled_at:
            return
        self._settled_at = self._loop.published
        for name, count in self._aggregator.settle(self._loop.published).items():
            device = self._by_name[name]
            self._told[device.index] += count
            self._owing.add(device.index)
        self._wait(self._all_told, self._owed)

    def _devices_settled(self) -> bool:
        self._active = {i for i in self._active if not self._devices[i].is_settled}
        return not self._active

    def _unsettled(self) -> str:
        named = [str(self._devices[i]) for i in sorted(self._active)[:3]]
        return f"messages of {', '.join(named)}"

    def _all_told(self) -> bool:
        devices, told = self._devices, self._told
        self._owing = {i for i in self._owing if devices[i].link.told < told[i]}
        return not any(devices[i].is_online and not devices[i].is_over for i in self._owing)

    def _owed(self) -> str:
        named = [self._devices[i].settings.name for i in sorted(self._owing)[:3]]
        return f"what the aggregator has told {', '.join(named)}"

    def _decide(self) -> None:
        """Have the aggregator do all that is due, and wait until the fleet knows of it."""
        while True:
            stands = self._aggregator.step(self._epoch_s + self.now_s)
            if stands["said"] != self._said:
                self._said = stands["said"]
                self._spread(stands["said"])
            if stands["action"] is None:
                return

    def _spread(self, said: str) -> None:
        """Wait until every device in reach has heard where the job stands."""
        behind = {d.index for d in self._devices if d.is_online and not d.is_over}
        known = b""

        def heard(index: int) -> bool:
            nonlocal known
            last = self._devices[index].link.last_round
            if last and last != known and hashlib.sha256(last).hexdigest()[:16] == said:
                known = last
            return bool(known) and last == known

        def all_heard() -> bool:
            nonlocal behind
            behind = {i for i in behind if not heard(i)}
            return not behind

        def unheard() -> str:
            named = [str(self._devices[i]) for i in sorted(behind)[:3]]
            return f"the round's news for {len(behind)} devices, as {', '.join(named)},"

        self._wait(all_heard, unheard)

    def _wait(self, happened: object, what: object) -> None:
        assert callable(happened) and callable(what)
        if not self._loop.pump_until(happened, QUIET_S):
            missing = (
                f"{what()} did not arrive within {QUIET_S:g} s at virtual time {self.now_s:g} s"
            )
            self._loop.give_up(missing)
            raise ReplayError(f"{missing}; look at the broker's log and limits")
