"""Who is revoked is out: at the aggregator at once, at the broker on the next connection."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from aggregator.errors import FolderError
from aggregator.intake import Intake
from aggregator.versions import Versions
from edge_client.errors import JoinRefused
from edge_client.join import join
from protocol import topics
from protocol.errors import TlsRefused
from protocol.events import EventLog
from protocol.messages import Status
from protocol.signing import SigningKey
from protocol.tls import TlsFiles, refusal
from tests.aggregator.uploading import Aggregator, make_job
from tests.protocol.test_transport import hang_up
from tests.security.fleet import LEAVES_SOCKET, Fleet, running_broker

pytestmark = [pytest.mark.timeout(60), LEAVES_SOCKET]


def refused_soon(fleet: Fleet, files: TlsFiles) -> None:
    """Knock until Mosquitto has dealt with SIGHUP, which it does between two messages."""
    deadline = time.monotonic() + 10
    while not refusal("127.0.0.1", fleet.folder.port, files.context()):
        assert time.monotonic() < deadline, "a revoked certificate is taken"
    with pytest.raises(TlsRefused, match="has been revoked"):
        fleet.link(files, "kitchen")


def test_a_revoked_certificate_is_refused_on_the_next_connection(fleet: Fleet) -> None:
    files, desk = fleet.join("kitchen"), fleet.join("desk")
    open_now = fleet.link(files, "kitchen")
    fleet.folder.revoke("kitchen", fleet.clock())
    assert fleet.folder.reload_broker() is not None
    refused_soon(fleet, files)
    fleet.link(desk, "desk")  # nobody else is touched
    # A connection that was open goes on: docs/security.md says so.
    open_now.publish(topics.topic("status", job="notes", device="kitchen"), b"x").check()


def test_a_revoked_device_says_why_it_is_not_let_back(fleet: Fleet) -> None:
    files, said = fleet.join("kitchen"), []
    link = fleet.link(files, "kitchen", on_outage=said.append)
    fleet.folder.revoke("kitchen", fleet.clock())
    fleet.folder.reload_broker()
    refused_soon(fleet, files)
    hang_up(link)
    deadline = time.monotonic() + 45
    while not said:
        assert time.monotonic() < deadline, "a device that is shut out is silent"
        assert link.receive(0.2) is None
    assert "has been revoked" in said[0]
    assert len(said) == 1


def test_without_sighup_mosquitto_takes_no_notice_and_a_restart_is_as_good(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    fleet.folder.revoke("kitchen", fleet.clock())
    fleet.link(files, "kitchen").close()
    pid = int((fleet.folder.path / "broker" / "mosquitto.pid").read_text())
    assert pid > 1
    fleet.stack.close()
    assert fleet.folder.reload_broker() is None
    with running_broker(fleet.folder), pytest.raises(TlsRefused, match="has been revoked"):
        fleet.link(files, "kitchen")


def test_all_certificates_of_a_name_are_revoked_and_a_new_one_is_good(fleet: Fleet) -> None:
    files = fleet.join("kitchen")
    first = files.certificate.read_bytes()
    fleet.join("kitchen")
    second = files.certificate.read_bytes()
    fleet.folder.revoke("kitchen", fleet.clock())
    fleet.join("kitchen")
    third = files.certificate.read_bytes()
    fleet.folder.reload_broker()
    for old in (first, second):
        files.certificate.write_bytes(old)
        refused_soon(fleet, files)
    files.certificate.write_bytes(third)
    fleet.link(files, "kitchen")


def test_a_token_is_worth_nothing_after_its_device_is_revoked(fleet: Fleet) -> None:
    token = fleet.token("kitchen")
    assert not fleet.folder.revoke("kitchen", fleet.clock()), "it had never joined"
    with pytest.raises(JoinRefused, match="no such token"):
        join(fleet.url, token, fleet.devices / "kitchen")
    with pytest.raises(FolderError, match=r"no device 'kitchen' .* no token .*nothing is revoked"):
        fleet.folder.revoke("kitchen", fleet.clock())


def test_a_device_that_has_joined_may_be_revoked_again(fleet: Fleet) -> None:
    fleet.join("kitchen")
    assert fleet.folder.revoke("kitchen", fleet.clock())
    fleet.token("kitchen")
    assert fleet.folder.revoke("kitchen", fleet.clock())


def test_without_the_cas_key_it_is_out_for_the_aggregator_and_the_operator_is_told(
    fleet: Fleet,
) -> None:
    files, key = fleet.join("kitchen"), fleet.folder.path / "ca.key"
    kept = key.rename(key.with_name("kept"))
    words = r"kitchen is out for the aggregator, but the broker still lets it in, .*ca\.key is mis"
    with pytest.raises(FolderError, match=words + ".*revoke it again"):
        fleet.folder.revoke("kitchen", fleet.clock())
    assert fleet.folder.registry().devices() == set()
    kept.rename(key)
    assert fleet.folder.revoke("kitchen", fleet.clock())
    fleet.folder.reload_broker()
    refused_soon(fleet, files)


def test_the_aggregator_hears_the_enrolled_alone_and_only_with_their_key(
    fleet: Fleet, tmp_path: Path
) -> None:
    """At once: nothing is read again, and no connection has to end first."""
    files = fleet.join("phone-1")
    key = SigningKey.load(files.key.parent / "device.key")
    made = Aggregator(tmp_path / "state", make_job())
    log = io.StringIO()
    intake = Intake(
        made.job,
        made.store,
        Versions(made.job, made.store),
        made.key,
        EventLog(as_json=True, stream=log),
        registry=fleet.folder.registry(),
    )

    def greet(device: str, signer: SigningKey, boot: int) -> bool:
        topic = topics.topic("status", job="notes", device=device)
        status = Status(job="notes", device=device, online=True, boot=boot)
        intake.handle(topic, signer.seal(status, topic))
        known = made.store.devices.status(device)
        return known is not None and known.boot == boot

    assert not greet("phone-1", SigningKey.generate(), 1)
    assert "another key" in log.getvalue()
    assert not greet("stranger", SigningKey.generate(), 1)
    assert "not enrolled" in log.getvalue()
    assert greet("phone-1", key, 2)
    fleet.folder.revoke("phone-1", fleet.clock())
    assert not greet("phone-1", key, 3)
    # Let in again with new keys, it counts its starts from one.
    for path in files.key.parent.iterdir():
        path.unlink()
    fleet.join("phone-1")
    assert not greet("phone-1", key, 4)
    assert greet("phone-1", SigningKey.load(files.key.parent / "device.key"), 1)
    made.store.close()
