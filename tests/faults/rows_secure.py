"""Rows of a fleet with certificates: who is put out of it, and who may not write what it has to."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from aggregator.enrol.server import utc_now
from edge_client.outbox import FILE
from protocol import topics
from tests.faults.audit import read_records
from tests.faults.rig import Service
from tests.faults.rows import Fault, Happened, Row, expect
from tests.faults.secure_rig import QUORUM, SecureRig

CHUNKS = 4
"""Of an update: three modules, and a header."""
REVOKED = "has been revoked"
DENIED = "access rules do not let this client do that"


def until_counted(rig: SecureRig, row: Row, device: Service) -> None:
    """Wait for the next update of a device to count, and note how long that took."""
    began = time.monotonic()
    rig.keep_up(lambda: rig.progress_at(device.name) > began)
    row.worst_s = max(row.worst_s, time.monotonic() - began)


def ends_saying(device: Service, words: str) -> Happened:
    """Return what looks whether a device has ended, from now on, with one line that says this."""
    since = len(device.ends)

    def happened() -> bool:
        said = [end for end in device.ends[since:] if "ended with 1: error: " in end]
        return any(words in end and "\n" not in end for end in said)

    return happened


# -- a certificate that is revoked -----------------------------------------------------------------


def stays_connected(rig: SecureRig, device: Service) -> None:
    """Leave its connection open: the aggregator drops what comes over it."""


def is_killed(rig: SecureRig, device: Service) -> None:
    """Kill it: the broker does not let it in again."""
    device.end(signal.SIGKILL)


def loses_its_broker(rig: SecureRig, device: Service) -> None:
    """Start the broker anew: it does not let the device in again, which waits and says why."""
    rig.broker.end(signal.SIGTERM)
    rig.broker.start()


WAYS = (stays_connected, is_killed, loses_its_broker)


def refused(rig: SecureRig, device: Service) -> Happened:
    """Return what looks whether a device has been refused from now on, and that was said."""
    ended, program = ends_saying(device, REVOKED), rig.aggregator.program
    place, since = f"/d/{device.name}/", len(program.of("refused"))

    def happened() -> bool:
        dropped = program.of("refused")[since:]
        return (
            ended()
            or any(REVOKED in event.get("why", "") for event in device.program.of("waiting"))
            or any(place in e["topic"] and REVOKED in e["reason"] for e in dropped)
        )

    return happened


def certificate_revoked(rig: SecureRig, row: Row, times: int) -> None:
    """Put a device out in mid-round; the others go on; let it in again under its name.

    Mosquitto 2.0.11 may crash some time after SIGHUP (docs/security.md). Whenever it is away all
    devices are, and rounds are merged of as few updates as the quorum has, without the others'.
    """
    rig.need(QUORUM)
    since, crashes, crashed = _round(rig), len(rig.broker.ends), 0
    for number in range(times):
        device, way = rig.random.choice(list(rig.devices.values())), WAYS[number % len(WAYS)]
        rig.restart(rig.aggregator)  # it allows a device so many messages, as `Fault.run` says
        time.sleep(rig.random.uniform(0, 1.5))
        row.tried += 1
        row.kills += way is not stays_connected
        first = _round(rig)
        _put_out_and_let_in(rig, row, device, way)
        crashed += len(rig.broker.ends) - crashes
        if way is loses_its_broker or len(rig.broker.ends) > crashes:
            here = range(since, _round(rig) + 1)
            rig.auditor.out |= {(name, n) for name in rig.devices for n in here}
        since, crashes = first, len(rig.broker.ends)
    rig.need(len(rig.devices))
    row.note = f"Mosquitto crashed {crashed} times" if crashed else ""


def _put_out_and_let_in(
    rig: SecureRig, row: Row, device: Service, way: Callable[[SecureRig, Service], None]
) -> None:
    first = _round(rig)
    rig.fleet.revoke(device.name, utc_now())
    last = _round(rig)
    said = refused(rig, device)
    expect(rig, row, lambda: rig.fleet.reload_broker() is not None, "the broker is told")
    way(rig, device)
    began = time.monotonic()
    rig.wait_for_rounds(2)
    row.worst_s = max(row.worst_s, time.monotonic() - began)
    expect(rig, row, said, f"{device.name} is refused ({way.__name__})")
    if late := _counted(rig, device, above=last):
        row.problems.append(f"{device.name} is out since round {last} and counts in {late}")
    if device.alive:
        device.end(signal.SIGTERM)
    expect(rig, row, lambda: rig.broker.alive and rig.aggregator.alive, "somebody lets it in")
    rig.enrol(device.name)
    device.start()
    until_counted(rig, row, device)
    back = _counted(rig, device, above=last)[0]
    rig.auditor.out |= {(device.name, n) for n in range(first, back)}


def _round(rig: SecureRig) -> int:
    return read_records(rig.folder / "aggregator").round


def _counted(rig: SecureRig, device: Service, above: int) -> list[int]:
    """Return the rounds above one in which a device has counted."""
    uploads = read_records(rig.folder / "aggregator").uploads.values()
    rounds = (n for who, n, state, *_ in uploads if (who, state) == (device.name, "counted"))
    return sorted(n for n in rounds if n > above)


# -- access rules ----------------------------------------------------------------------------------


@contextmanager
def denied(rig: SecureRig, device: Service) -> Iterator[None]:
    """Have the broker deny a device the topics of some chunks, while the block lasts."""
    path = rig.fleet.path / "acl"
    before = path.read_text()
    pattern = topics.TABLE["upload_chunk"].pattern
    numbers = rig.random.sample(range(CHUNKS), rig.random.randint(1, CHUNKS))
    filters = [
        pattern.format(job="+", device=device.name, upload="+", index=n) for n in sorted(numbers)
    ]
    path.write_text(
        "\n".join([before, f"user {device.name}", *(f"topic deny {f}" for f in filters), ""])
    )
    rig.fleet.reload_broker()
    try:
        yield
    finally:
        path.write_text(before)
        rig.fleet.reload_broker()


def access_denied(rig: SecureRig, row: Row, times: int) -> None:
    """Deny a device its chunks; it says so and keeps its update, which counts in the end."""
    for _ in range(times):
        device = rig.random.choice(list(rig.devices.values()))
        time.sleep(rig.random.uniform(0, 1.5))
        row.tried += 1
        says_so = ends_saying(device, DENIED)
        with denied(rig, device):
            expect(rig, row, says_so, f"{device.name} says what it may not")
            with closing(sqlite3.connect(rig.folder / device.name / FILE, timeout=30)) as outbox:
                if outbox.execute("SELECT count(*) FROM updates").fetchone() != (1,):
                    row.problems.append(f"{device.name} has not kept its update")
        until_counted(rig, row, device)


def secured() -> list[Fault]:
    """Return the faults of a fleet with certificates."""
    return [
        Fault("certificate revoked", certificate_revoked, 9),
        Fault("ACL denial", access_denied, 9),
    ]
