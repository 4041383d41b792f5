"""One job's state folder, read: how the job stands, its rounds, its versions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from aggregator.errors import StoreError
from aggregator.issued import TrustMatrix
from aggregator.rounds import Policy, RoundState
from aggregator.steering import Steering
from aggregator.view import crowd, devices, rounds
from aggregator.view.database import ReadOnly
from aggregator.view.models import (
    Crowd,
    DeviceCounts,
    DeviceDetail,
    DeviceView,
    JobView,
    RoundDevice,
    RoundView,
    Totals,
    VersionView,
)
from aggregator.view.words import Cohort, job_waits_for
from protocol.cohort import in_cohort
from protocol.files import folder_holder

LAST = 2**62
"""Beyond every round's number."""


class StateView:
    """Read one job's state folder, served or not.

    One thread at a time may use it. Raises, as every method does:
        StoreError: there is no state there, or it can't be read.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._db = ReadOnly(folder)
        self._ended = (0, 0, 0)
        """Number of a round, and the bytes up and down of those below it."""

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> StateView:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()

    def stamp(self) -> tuple[tuple[int, int], int | None]:
        """Return what is something else once somebody wrote, or the daemon came or went."""
        return self._db.stamp(), folder_holder(self.folder)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Have all that is asked in the block be of one moment."""
        with self._db.snapshot():
            yield

    # -- the job ---------------------------------------------------------------------------------

    def job(self) -> JobView:
        """Return how the job stands."""
        with self.snapshot():
            settings, state, now = self.settings(), self.round_state(), self._clock()
            steering, policy = self.steering(), self.policy()
            up, down = self._traffic(state.number)
            share = policy.share(state.attempt)
            cohort = self._cohort(settings["job"], state, share, buffered=policy.buffer > 0)
            refused = self._db.one("SELECT count(*) FROM refused WHERE round = ?", [state.number])
            waiting_for = job_waits_for(
                state, policy, cohort, paused=steering.paused is not None, now=now
            )
            is_open = state.state == "open"
            return JobView(
                name=settings["job"],
                folder=str(self.folder),
                rule=settings["rule"],
                base=settings["base"]["name"],
                rank=settings["ladder"][-1],
                ladder=tuple(settings["ladder"]),
                state=state.state,
                round=state.number,
                rounds=settings["rounds"],
                attempt=state.attempt,
                version=state.version,
                deadline=None if steering.paused is not None else state.deadline,
                paused=steering.paused,
                waiting_for=waiting_for,
                policy=policy,
                changed=dict(steering.changed),
                devices=self.counts(),
                delivered=cohort.delivered if is_open else 0,
                refused=refused[0] if is_open else 0,
                up_bytes=up,
                down_bytes=down,
                process=folder_holder(self.folder),
            )

    @property
    def is_bound(self) -> bool:
        """Whether a job has been served from here."""
        return self._meta("job") is not None

    def settings(self) -> dict[str, Any]:
        """Return the job's settings, as it was begun with."""
        known = self._meta("job")
        if known is None:
            raise StoreError(f"no job has been served from {self.folder} yet")
        settings: dict[str, Any] = json.loads(known)
        return settings

    def round_state(self) -> RoundState:
        known = self._meta("round")
        return (
            RoundState(0, "waiting", 0, None) if known is None else RoundState(**json.loads(known))
        )

    def steering(self) -> Steering:
        """Return what an operator has changed while the job was served."""
        known = self._meta("steering")
        return Steering() if known is None else Steering(**json.loads(known))

    def policy(self) -> Policy:
        """Return the policy that is in force, by what the job was served with last."""
        known = self._meta("policy")
        return self.steering().policy(Policy() if known is None else Policy(**json.loads(known)))

    def _cohort(self, job: str, state: RoundState, share: float, *, buffered: bool) -> Cohort:
        ready = self.ready()
        asked = {d for d in ready if share >= 1 or in_cohort(d, job, state.number, share)}
        updates = self._db.rows(
            "SELECT device, trained FROM counted WHERE round = ?", [state.number]
        )
        counted = {device for device, _ in updates}
        done = {device for device, trained in updates if trained == state.number or not buffered}
        refused = self._names(
            "SELECT device FROM uploads WHERE state = 'rejected' AND round = ? AND "
            "coalesce(json_extract(manifest, '$.attempt'), 0) = ?",
            state.number,
            state.attempt,
        )
        heard = asked & (done | refused)
        return Cohort(len(ready), len(asked), len(counted), len(heard), len(updates))

    def _traffic(self, number: int) -> tuple[int, int]:
        """Return the bytes up and down of all rounds; those below this one are added up once."""
        query = (
            "SELECT coalesce(sum(up_bytes), 0), coalesce(sum(down_bytes), 0) FROM counted "
            "WHERE round >= ? AND round < ?"
        )
        below, *ended = self._ended
        if number != below:
            up, down = self._db.one(query, [below if number > below else 0, number])
            before = ended if number > below else (0, 0)
            self._ended = (number, before[0] + up, before[1] + down)
        now = self._db.one(query, [number, LAST])
        return self._ended[1] + now[0], self._ended[2] + now[1]

    def _names(self, query: str, *values: object) -> set[str]:
        return {name for (name,) in self._db.rows(query, values)}

    def _meta(self, key: str) -> str | None:
        row = self._db.one("SELECT value FROM meta WHERE key = ?", [key])
        return None if row is None else str(row[0])

    # -- devices ---------------------------------------------------------------------------------

    def counts(self) -> DeviceCounts:
        """Return how many devices are how."""
        return devices.counts(self._db, self._clock())

    def ready(self) -> set[str]:
        """Return the devices that may take part: no round waits for one that is kept out."""
        return devices.ready(self._db, self._clock())

    def devices(
        self,
        *,
        state: str = "",
        search: str = "",
        order: str = "name",
        descending: bool = False,
        offset: int = 0,
        limit: int = 100,
    ) -> list[DeviceView]:
        """Return a page of the devices.

        `state` is one of `DeviceCounts.by_state`, "online" or "quarantined"; `search` a part of
        the name; `order` one of aggregator.view.devices.ORDERS.

        Raises:
            ValueError: there is no such order.
        """
        with self.snapshot():
            where = devices.Where(
                self.settings()["job"], self.round_state(), self.policy(), self.steering()
            )
            page = devices.Page(state, search, order, descending, offset, limit)
            return devices.page(self._db, where, page, self._clock())

    def count(self, *, state: str = "", search: str = "") -> int:
        """Return how many devices `devices` has, on all pages."""
        page = devices.Page(state, search, "name", False, 0, 0)
        return devices.count(self._db, page, self._clock())

    def crowd(self) -> Crowd:
        """Return a large fleet at a glance: a letter for each device, and why devices wait."""
        with self.snapshot():
            where = devices.Where(
                self.settings()["job"], self.round_state(), self.policy(), self.steering()
            )
            return crowd.crowd(self._db, where, self._clock())

    def device(self, name: str, rounds_shown: int = 50) -> DeviceDetail | None:
        """Return all that is known of a device; None where there is none of that name."""
        with self.snapshot():
            where = devices.Where(
                self.settings()["job"], self.round_state(), self.policy(), self.steering()
            )
            found = devices.one(self._db, where, name, self._clock())
            if found is None:
                return None
            modules = self.settings()["base"]["modules"]
            return devices.detail(self._db, found, modules, rounds_shown)

    # -- rounds ----------------------------------------------------------------------------------

    def rounds(self, *, before: int | None = None, limit: int = 100) -> list[RoundView]:
        """Return rounds below the number `before`, the newest first; of all, without it."""
        with self.snapshot():
            return rounds.page(self._db, before, limit)

    def round(self, number: int) -> RoundView | None:
        """Return one round with its shares; None where it has not begun."""
        with self.snapshot():
            return rounds.one(self._db, number)

    def round_devices(self, number: int, *, offset: int = 0, limit: int = 100) -> list[RoundDevice]:
        """Return what devices did in a round, in the order of their names."""
        return rounds.devices(self._db, number, offset, limit)

    def device_losses(self, numbers: Sequence[int], few: int) -> dict[str, list[float | None]]:
        """Return the losses of each device in these rounds; nothing where there are many devices.

        Those are more than `few` that have told a loss.
        """
        return rounds.device_losses(self._db, numbers, few) if numbers else {}

    def loss_spread(self, number: int) -> tuple[float, float] | None:
        """Return between what the middle 80 % of a round's losses are; None where there is none."""
        return rounds.loss_spread(self._db, number)

    def totals(self, bounds_s: Sequence[float] = ()) -> Totals:
        """Return what has come so far; merges are counted up to each bound, in seconds."""
        with self.snapshot():
            return rounds.totals(self._db, bounds_s)

    def trust_rounds(self) -> list[int]:
        """Return the rounds that there is a trust matrix of, ascending."""
        return [n for (n,) in self._db.rows("SELECT round FROM trust ORDER BY round")]

    def trust(self, number: int) -> TrustMatrix | None:
        """Return how a round's devices were mixed; None where the rule has no trust, or no more."""
        row = self._db.one("SELECT matrix FROM trust WHERE round = ?", [number])
        return TrustMatrix(**json.loads(row[0])) if row else None

    # -- versions --------------------------------------------------------------------------------

    def versions(self) -> list[VersionView]:
        """Return the versions that are kept, the newest first."""
        return rounds.versions(self._db)
