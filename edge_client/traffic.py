"""What a round sends over a device's network, by its rank, and how much of that may be.

An upload grows with the rank that is trained, a download with the directions that are held. A link
whose speed is known carries so much in the time that the settings give it (a wish), and the owner's
policy says how much a round may transfer (a rule).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from edge_client.config import Settings
from edge_client.errors import NoPlanFits
from protocol.adapter import Shapes, parameter_count
from protocol.layers import last_blocks
from protocol.messages import Job
from protocol.tensors import bytes_each

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Traffic:
    """Count the bytes of a round, tensors alone, and say which adapters it may be for."""

    held: Shapes
    """Modules of which a version has adapters."""
    trained: Shapes
    """Those that an update has."""
    down_each: int
    """Bytes of a number that is downloaded."""
    up_each: int
    link_down: float = inf
    """Bytes that the link carries in the time that it is given."""
    link_up: float = inf
    link_s: float = 0.0
    """That time."""
    mib_a_round: float | None = None
    """What the owner allows, both ways together."""

    def down(self, held: int) -> int:
        """Return the bytes of a version's first `held` directions."""
        return parameter_count(self.held, held) * self.down_each

    def up(self, rank: int) -> int:
        """Return the bytes of an update of `rank`."""
        return parameter_count(self.trained, rank) * self.up_each

    def left_to_download(self, rank: int) -> float:
        """Return what the owner leaves a round for downloads beside an update of `rank`."""
        return inf if self.mib_a_round is None else self.mib_a_round * MIB - self.up(rank)

    def why_not(self, rank: int, held: int) -> str:
        """Return in words what is against training `rank` of `held` directions; "" if nothing."""
        if self.down(held) > self.left_to_download(rank):
            return f"the policy's mib_a_round = {self.mib_a_round:g} allows"
        if self.up(rank) > self.link_up:
            return f"the link sends in {self.link_s:g} s"
        if self.down(held) > self.link_down:
            return f"the link brings in {self.link_s:g} s"
        return ""

    def carried(self, adapters: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return those of (rank, held), smallest first, that may be: one at least.

        Raises:
            NoPlanFits: the owner allows none.
        """
        known = list(adapters)
        allowed = [a for a in known if self.down(a[1]) <= self.left_to_download(a[0])]
        if not allowed:
            rank, held = known[0]
            takes = (self.up(rank) + self.down(held)) / MIB
            raise NoPlanFits(
                f"the policy's mib_a_round = {self.mib_a_round:g} is too little: a round of rank "
                f"{rank}, the job's smallest, transfers {takes:.2f} MiB; allow that, or leave the "
                "setting out"
            )
        return [a for a in allowed if not self.why_not(*a)] or allowed[:1]


def traffic_of(settings: Settings, job: Job, blocks: int = 0) -> Traffic:
    """Return what a job's rounds send, where a device trains its last `blocks` (0: all)."""
    shapes = job.base.modules
    return Traffic(
        shapes,
        {name: shapes[name] for name in last_blocks(shapes, blocks)},
        bytes_each(job.encoding_down),
        bytes_each(job.encoding_up),
        settings.download_bytes,
        settings.upload_bytes,
        settings.download_s,
        settings.policy.mib_a_round,
    )
