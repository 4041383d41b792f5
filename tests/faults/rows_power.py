"""What a power cut in mid-upload costs: bytes that are sent again, counted on the link."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.chunks import CHUNK_BYTES
from protocol.connecting import WINDOW
from tests.faults.link import BadLink
from tests.faults.rig import Rig, running

MODULES = 120
"""The update has as many chunks, and one: some times the window."""
BOUND_BYTES = (WINDOW + 1) * CHUNK_BYTES


@dataclass
class CutRow:
    """What came of one way to cut an upload."""

    fault: str
    tried: int = 0
    worst_bytes: int = 0
    bound_bytes: int = BOUND_BYTES

    @property
    def good(self) -> bool:
        return 0 <= self.worst_bytes <= self.bound_bytes


def cut_link(rig: Rig, link: BadLink) -> None:
    link.hang_up()


def cut_device(rig: Rig, link: BadLink) -> None:
    link.hang_up()  # what its kernel still holds would arrive
    rig.devices["attic"].end(signal.SIGKILL)


def cut_broker(rig: Rig, link: BadLink) -> None:
    rig.broker.end(signal.SIGKILL)


def cut_aggregator(rig: Rig, link: BadLink) -> None:
    rig.aggregator.end(signal.SIGKILL)


WAYS: dict[str, Callable[[Rig, BadLink], None]] = {
    "the link was cut": cut_link,
    "the device was killed": cut_device,
    "the broker was killed": cut_broker,
    "the aggregator was killed": cut_aggregator,
}


def bytes_again(rig: Rig, link: BadLink, size: int, cut: Callable[[Rig, BadLink], None]) -> int:
    """Cut an upload somewhere in its middle; return what it took in all over its size."""
    rig.wait_for_rounds(1)
    before = link.bytes_up
    link.wait_for_up(before + int(size * rig.random.uniform(0.2, 0.8)))
    cut(rig, link)
    rig.wait_for_rounds(1)
    time.sleep(0.2)
    return link.bytes_up - before - size


def power_cuts(folder: Path, seed: int, times: int, modules: int = MODULES) -> list[CutRow]:
    """Cut uploads of one device in every way."""
    rows = [CutRow(name) for name in WAYS]
    with (
        running(folder / "cuts", seed, ("attic",), modules) as rig,
        BadLink(rig.port) as link,
    ):
        rig.addresses["attic"] = link.url
        rig.begin()
        for row in rows:
            for _ in range(times):
                again = bytes_again(rig, link, modules * CHUNK_BYTES, WAYS[row.fault])
                row.tried += 1
                row.worst_bytes = max(row.worst_bytes, again)
            print(f"{row.fault}: at most {row.worst_bytes} bytes again", flush=True)
        problems = rig.auditor.audit().problems
        assert not problems, problems
    return rows
