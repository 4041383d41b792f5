"""More rows: what goes wrong around the processes: links, clocks, the broker's disk, strangers."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from protocol.messages import Status
from protocol.signing import SigningKey
from protocol.topics import topic
from protocol.transport import BrokerAddress, MqttTransport
from tests.faults.heckler import Heckler
from tests.faults.link import BadLink
from tests.faults.processes import Program
from tests.faults.rig import JOB, Rig, Service
from tests.faults.rows import Fault, Row

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
"""libfaketime, where it is installed (Debian: faketime)."""
YEAR = "365d"


def timed(rig: Rig, row: Row, what: Callable[[], None], rounds: int = 1) -> None:
    """Do something, and note how long it took until as many more rounds were merged."""
    row.tried += 1
    what()
    began = time.monotonic()
    rig.wait_for_rounds(rounds)
    row.worst_s = max(row.worst_s, time.monotonic() - began)


def broker_forgets(rig: Rig, row: Row, times: int) -> None:
    """Kill the broker and take away its disk."""
    for _ in range(times):
        time.sleep(rig.random.uniform(0, 1.5))

        def forget() -> None:
            rig.broker.end(signal.SIGKILL)
            rig.forget_broker()
            rig.broker.start()

        timed(rig, row, forget)
        row.kills += 1


@contextmanager
def bad_links(rig: Rig) -> Iterator[list[BadLink]]:
    """Put a link of its own between each device and the broker for as long as the block lasts."""
    before = dict(rig.addresses)
    with ExitStack() as stack:
        links = []
        for name in rig.addresses:
            link = stack.enter_context(BadLink(rig.port))
            rig.addresses[name] = link.url
            links.append(link)
        rig.restart(*rig.devices.values())
        try:
            yield links
        finally:
            rig.addresses.update(before)
            rig.restart(*rig.devices.values())


def slow_links(rig: Rig, row: Row, times: int) -> None:
    """Half a second there and back, 400 kB a second."""
    with bad_links(rig) as links:
        for link in links:
            link.delay_s, link.bytes_per_s = 0.02, 800e3
        for _ in range(times):
            timed(rig, row, lambda: None)


def half_open_links(rig: Rig, row: Row, times: int) -> None:
    """The other end of every connection is gone and nobody says so; new ones are good."""
    with bad_links(rig) as links:
        for _ in range(times):
            time.sleep(rig.random.uniform(0, 1))
            timed(rig, row, lambda: [link.go_silent() for link in links], rounds=2)


def cut_links(rig: Rig, row: Row, times: int) -> None:
    """Connections end at some byte on its way up, in a packet or between two."""
    with bad_links(rig) as links:
        while row.tried < times:
            before = sum(link.cuts for link in links)
            for link in links:
                link.cut_at = rig.random.randint(1, 800_000)
            rig.wait_for_rounds(1)
            row.tried += sum(link.cuts for link in links) - before
        began = time.monotonic()
        rig.wait_for_rounds(1)
        row.worst_s = time.monotonic() - began


def other_clock(*names: str, shift: str) -> Callable[[Rig, Row, int], None]:
    """Return what starts services with their clock set wrong, and then right again."""

    def strike(rig: Rig, row: Row, times: int) -> None:
        if not FAKETIME:
            row.note = "not tried: libfaketime is not installed (Debian: faketime)"
            return
        services: list[Service] = [s for s in rig.services if s.name in names]
        services += rig.devices.values() if "devices" in names else []
        wrong = {
            "LD_PRELOAD": str(FAKETIME[0]),
            "FAKETIME": f"{shift}{YEAR}",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        for _ in range(times):
            for environment in (wrong, {}):
                for service in services:
                    service.environment = environment
                row.tried += 1
                row.worst_s = max(row.worst_s, rig.restart(*services))

    return strike


def two_of_a_name(rig: Rig, row: Row, times: int) -> None:
    """A second device takes the name of the first: it looks, shares its state, asks nobody."""
    name, address = next(iter(rig.devices)), BrokerAddress("127.0.0.1", rig.port)
    logs = rig.folder / "logs"
    for number in range(times):
        for state, refusal in ((f"twin-{number}", "another device"), (name, "another edge-client")):
            arguments = ["--name", name, "--broker", address, "--state", rig.folder / state]
            row.tried += 1
            with Program("tests.faults.device", arguments, logs, "twin") as twin:
                if twin.wait() != 1 or refusal not in twin.stderr:
                    row.problems.append(f"a second {name!r} was let in: {twin.stderr}")
        shutil.rmtree(rig.folder / f"twin-{number}")

        def usurp() -> None:
            link, key = MqttTransport(address, f"tunefleet-{name}"), SigningKey.generate()
            link.connect()
            where = topic("status", job=JOB, device=name)
            status = Status(job=JOB, device=name, online=True, boot=1 << 40, rank=64)
            link.publish(where, key.seal(status, where))
            link.close()

        timed(rig, row, usurp)


def heckled(rig: Rig, row: Row, times: int) -> None:
    """A stranger repeats, swaps, breaks, cuts and misnumbers the chunks that devices send."""
    with Heckler(BrokerAddress("127.0.0.1", rig.port), JOB, rig.random) as heckler:
        while heckler.said < times:
            rig.wait_for_rounds(1)
        row.tried = heckler.said


def around() -> list[Fault]:
    clocks = [
        Fault(f"clock of {who} {shift}1 year", other_clock(who, shift=shift), 2)
        for who in ("aggregator", "devices")
        for shift in "+-"
    ]
    return [
        Fault("broker kill -9, disk lost", broker_forgets, 20),
        Fault("slow links", slow_links, 5),
        Fault("half-open links", half_open_links, 2),
        Fault("links cut at some byte", cut_links, 60),
        *clocks,
        Fault("two devices under one id", two_of_a_name, 3),
        Fault("hostile chunks", heckled, 300),
    ]
