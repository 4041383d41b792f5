"""The plan that a device learns a job by: made at its start, smaller after a kill, or anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_client.errors import EdgeError
from edge_client.outbox import Outbox
from edge_client.plan import Plan
from edge_client.prepare import Equipment
from protocol.events import EventLog
from protocol.messages import Job


@dataclass(frozen=True, slots=True)
class Reach:
    """Say what a device can do with a job."""

    rank: int
    held: int
    """Directions that it can hold."""
    blocks: int = 0
    """The last so many are trained; 0: all."""


class Plans:
    """Hold a device's plan for a job; `truncate` hears how many directions a new one holds.

    Raises:
        NoPlanFits: the device's memory is too small for the job.
    """

    def __init__(
        self,
        job: Job,
        equipment: Equipment,
        outbox: Outbox,
        events: EventLog,
        stopping: Callable[[], bool],
        truncate: Callable[[int], None],
    ) -> None:
        self._job, self._equipment, self._outbox = job, equipment, outbox
        self._events, self._stopping, self._truncate = events, stopping, truncate
        self.now: Plan = self._make()

    @property
    def rank(self) -> int:
        """The rank now: the plan's, or what self-pruning has left of it."""
        return min(self.now.rank, self._outbox.rank(self._job.job, self.now.rank))

    def reach(self) -> Reach:
        """Return what the device can do now."""
        return Reach(self.rank, self.now.held, self.now.blocks)

    def step_down(self, before: Plan, why: str) -> Plan:
        """Take a smaller plan in place of one under which training was killed for its memory."""
        if self._stopping():
            raise EdgeError("training was killed to stop")  # no plan was too much
        self._outbox.lower_ceiling(self._job.job, before.predicted_mib)
        plan = self._make()
        self._events.emit(
            "stepped-down",
            why=why,
            before=str(before),
            plan=str(plan),
            predicted_before_mib=before.predicted_mib,
            predicted_mib=plan.predicted_mib,
        )
        self.now = plan
        self._truncate(plan.held)
        return plan

    def anew(self) -> Plan | None:
        """Plan by what memory there is now; return the plan where it is another than before.

        Raises:
            NoPlanFits: there is not enough for any; the plan stays.
        """
        before, plan = self.now, self._make()
        if plan == before:
            return None
        self._events.emit("planned-anew", before=str(before), plan=str(plan), rank=plan.rank)
        self.now = plan
        self._truncate(plan.held)
        return plan

    def _make(self) -> Plan:
        return self._equipment.plan(below_mib=self._outbox.ceiling_mib(self._job.job))
