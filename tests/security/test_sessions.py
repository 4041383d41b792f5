"""A certificate has one session at the broker: looking around before a start does not end it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from aggregator.daemon import Daemon
from aggregator.rounds import Policy
from aggregator.store import Store
from device_profiles.schema import load_profile
from edge_client.config import Settings
from edge_client.discover import discover_job
from protocol import topics
from protocol.events import EventLog
from protocol.patience import Waiting
from protocol.signing import SigningKey
from protocol.transport import MqttTransport
from tests.aggregator.uploading import make_job
from tests.security.fleet import Fleet

pytestmark = pytest.mark.timeout(60)
CONTROL = topics.topic("control", job="notes", device="kitchen")
STATUS = topics.topic("status", job="notes", device="kitchen")


def heard(link: MqttTransport) -> set[str]:
    found = set()
    while (incoming := link.receive(0.5)) is not None:
        link.ack(incoming)
        found.add(incoming.topic)
    return found


@pytest.mark.parametrize("named", ["", "notes"])
def test_what_waits_for_a_device_waits_on_while_it_looks_for_a_job(
    fleet: Fleet, tmp_path: Path, named: str
) -> None:
    files, aggregator = fleet.join("kitchen"), fleet.aggregator()
    before = fleet.link(files, "kitchen")
    before.subscribe([CONTROL])
    before.close()
    aggregator.publish(topics.topic("job", job="notes"), b"{}", retain=True).check()
    aggregator.publish(CONTROL, b"{}").check()
    settings = Settings(
        name="kitchen",
        broker=fleet.folder.broker_for_devices,
        tls=files,
        data=(tmp_path,),
        state=tmp_path,
        cache=tmp_path,
        profile=load_profile("laptop-16gb"),
        job=named,
    )
    key = SigningKey.generate().public
    waiting = Waiting(EventLog(as_json=True))
    assert discover_job(settings, key, lambda: False, waiting) == "notes"
    assert CONTROL in heard(fleet.link(files, "kitchen"))


def test_what_waits_for_the_aggregator_waits_on_while_it_starts(
    fleet: Fleet, tmp_path: Path
) -> None:
    log = io.StringIO()

    def daemon() -> Daemon:
        made = Daemon(
            make_job(),
            Policy(),
            Store(tmp_path / "state"),
            fleet.folder.broker_here,
            EventLog(as_json=True, stream=log),
            key=fleet.folder.signing_key(),
            membership=fleet.folder.membership(),
        )
        fleet.stack.callback(made._link.close)
        made.start()
        return made

    daemon()._link.close()
    kitchen = fleet.link(fleet.join("kitchen"), "kitchen")
    kitchen.publish(STATUS, b"{}").check()  # not retained: only the session has it
    # What comes while it says where the job stands is taken in at once, and this is no status.
    assert STATUS in heard(daemon()._link) or STATUS in log.getvalue()
