"""Rows of full disks: the aggregator's, below what it keeps free and to the last byte; a device's.

Where nothing may be mounted they are not tried.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from aggregator.store import RESERVE_BYTES
from tests.faults.rig import Rig, Service
from tests.faults.rows import Fault, Row, expect
from tests.faults.small_disk import MIB, fill, mounted

LEDGER = "ledger.jsonl"
FULL_S = 3.0
"""A disk stays full for this long."""
IN_WORDS = re.compile(r"\S+ ended with 1: error: [^\n]*(disk is full|No space left)[^\n]*")


@contextmanager
def small_disk(rig: Rig, service: Service, room: int) -> Iterator[str]:
    """Have a service's state on a disk with so many bytes left; yield why not, where not.

    A device's ledger stays where there is room: it belongs to the test.
    """
    state = rig.folder / service.name
    before, after = (state.with_name(f"{state.name}-{when}") for when in ("before", "after"))
    service.end(signal.SIGTERM)
    state.rename(before)
    used = sum(path.stat().st_size for path in before.rglob("*"))
    with mounted(state, used + room) as why:
        shutil.copytree(before, state, dirs_exist_ok=True)
        if (ledger := state / LEDGER).exists():
            ledger.unlink()
            ledger.symlink_to(before / LEDGER)
        service.start()
        try:
            yield why
        finally:
            service.end(signal.SIGTERM)
            shutil.copytree(state, after)
    shutil.rmtree(state)
    after.rename(state)
    shutil.rmtree(before)
    service.start()


@contextmanager
def full(rig: Rig, row: Row, service: Service, leave: int = 0) -> Iterator[None]:
    """Fill a service's disk, up to some bytes, while the block lasts; then wait for a round.

    The service may end for that, with one line, and is started again.
    """
    row.tried += 1
    ended = len(service.ends)
    time.sleep(rig.random.uniform(0, 1))
    service.program.process.send_signal(signal.SIGSTOP)
    ballast = fill(rig.folder / service.name, leave)
    service.program.process.send_signal(signal.SIGCONT)
    yield
    ballast.unlink()
    began = time.monotonic()
    rig.wait_for_rounds(1)
    row.worst_s = max(row.worst_s, time.monotonic() - began)
    row.problems += [end for end in service.ends[ended:] if not IN_WORDS.fullmatch(end)]


def stay(rig: Rig) -> None:
    """Keep all others up for a while."""
    until = time.monotonic() + FULL_S
    rig.keep_up(lambda: time.monotonic() > until)


def aggregators_disk(rig: Rig, row: Row, times: int) -> None:
    """To the last byte, and, in turn, so far that no more uploads are taken."""
    ended = len(rig.aggregator.ends)
    with small_disk(rig, rig.aggregator, RESERVE_BYTES + 64 * MIB) as why:
        for number in range(0 if why else times):
            if number % 2 == 0:
                with full(rig, row, rig.aggregator):
                    stay(rig)
                continue
            told = [len(device.program.of("waiting")) for device in rig.devices.values()]
            with full(rig, row, rig.aggregator, leave=RESERVE_BYTES // 2):
                expect(rig, row, lambda told=told: _wait(rig, told), "a device is told to wait")
    row.note = why or f"it ended {len(rig.aggregator.ends) - ended} times"


def _wait(rig: Rig, told: list[int]) -> bool:
    """Say whether a device has been told to wait for room, besides what they were told before."""
    events = (d.program.of("waiting")[n:] for d, n in zip(rig.devices.values(), told, strict=True))
    return any("disk is full" in event.get("reason", "") for each in events for event in each)


def devices_disk(rig: Rig, row: Row, times: int) -> None:
    """To the last byte: it keeps what it has, and what it can't keep it trains again."""
    device = rig.random.choice(list(rig.devices.values()))
    ended = len(device.ends)
    with small_disk(rig, device, 2 * MIB) as why:
        for _ in range(0 if why else times):
            with full(rig, row, device):
                stay(rig)
    row.note = why or f"it ended {len(device.ends) - ended} times"


def full_disks() -> list[Fault]:
    """Return the faults of disks without room."""
    return [
        Fault("aggregator's disk full", aggregators_disk, 6),
        Fault("a device's disk full", devices_disk, 6),
    ]
