"""What plans are made for: what a job asks of a device, what its owner does, what may be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.config import Settings
from edge_client.traffic import Traffic, traffic_of
from protocol.adapter import Shapes
from protocol.messages import Job, Training


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job asks of a device, and what its owner does: all that plans are made for."""

    shapes: Shapes
    ladder: Sequence[int]
    shared_rank: int
    """Directions of the shared adapter; 0 where the job drops the remainder."""
    training: Training
    private_rank: int = 0
    """Rank of an adapter that the device trains for itself, beside all that it holds."""
    blocks: int = 0
    """The last so many are trained (0: all), as they were where the constants were measured."""
    traffic: Traffic | None = None
    """What a round may transfer; None: anything."""

    @property
    def adapters(self) -> list[tuple[int, int]]:
        """Every rank with every number of directions held beside it that may be transferred.

        Raises:
            NoPlanFits: there is none.
        """
        pairs = [(rank, held) for rank in self.ladder for held in self._holding(rank)]
        return self.traffic.carried(pairs) if self.traffic else pairs

    def _holding(self, rank: int) -> list[int]:
        return [h for h in self.ladder if rank <= h <= self.shared_rank] or [rank]


def wanted_of(settings: Settings, job: Job, blocks: int) -> Wanted:
    """Return what plans are made for."""
    return Wanted(
        shapes=job.base.modules,
        ladder=job.ladder,
        shared_rank=job.rank if job.remainder == "frozen" else 0,
        training=job.training,
        private_rank=settings.private_rank,
        blocks=blocks,
        traffic=traffic_of(settings, job, blocks),
    )
