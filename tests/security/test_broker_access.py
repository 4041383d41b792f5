"""What a device may do at a real Mosquitto with the configuration that `aggregator init` writes."""

from __future__ import annotations

import socket
import ssl
import time
import warnings

import pytest

from aggregator.enrol.broker_config import PACKET_BYTES
from protocol import topics
from protocol.errors import DeliveryRefused, MessageTooLarge, TlsRefused, TransportError
from protocol.tls import client_context
from protocol.transport import BrokerAddress, MqttTransport
from tests.security.fleet import LEAVES_SOCKET, Fleet, make_folder

pytestmark = [pytest.mark.timeout(60), LEAVES_SOCKET]

UPLOAD = "0" * 32
OWN = {"job": "notes", "device": "kitchen"}
ONNX = [
    topics.topic("onnx_manifest", job="notes"),
    topics.topic("onnx_chunk", job="notes", artifact=UPLOAD, file="train.onnx", index=0),
]
OTHERS = [
    topics.topic("job", job="notes"),
    topics.topic("round", job="notes"),
    topics.topic("global_manifest", job="notes", version=1),
    topics.topic("global_chunk", job="notes", version=1, band="0-2", index=0),
    topics.topic("control", **OWN),
    topics.topic("status", job="notes", device="desk"),
    topics.topic("upload_manifest", job="notes", device="desk", upload=UPLOAD),
    topics.topic("upload_chunk", job="notes", device="desk", upload=UPLOAD, index=0),
    topics.topic("control", job="notes", device="desk"),
    *ONNX,
    "anything/else",
    "$SYS/broker/load",
]


def test_a_device_writes_its_own_topics_and_no_others(fleet: Fleet) -> None:
    kitchen = fleet.link(fleet.join("kitchen"), "kitchen")
    own = [
        topics.topic("status", **OWN),
        topics.topic("upload_manifest", **OWN, upload=UPLOAD),
        topics.topic("upload_chunk", **OWN, upload=UPLOAD, index=0),
    ]
    assert not any(d.refused for d in kitchen.publish_all([(t, b"x") for t in own]))
    for delivery in kitchen.publish_all([(t, b"x") for t in OTHERS]):
        assert "not authorized: its access rules" in delivery.refused, delivery.topic
        with pytest.raises(DeliveryRefused, match="access rules"):
            delivery.check()
    assert kitchen.connection == 1


def test_a_device_reads_what_is_for_it_and_nothing_else(fleet: Fleet) -> None:
    kitchen_files, desk_files = fleet.join("kitchen"), fleet.join("desk")
    kitchen, desk = fleet.link(kitchen_files, "kitchen"), fleet.link(desk_files, "desk")
    kitchen.subscribe(["#"])
    aggregator = fleet.aggregator()
    aggregator.subscribe([topics.subscription("status"), topics.subscription("upload_chunk")])
    mine = [*OTHERS[:4], *ONNX, topics.topic("control", **OWN)]
    for topic in [*mine, topics.topic("control", job="notes", device="desk")]:
        aggregator.publish(topic, b"x").check()
    desk.publish(topics.topic("status", job="notes", device="desk"), b"x").check()
    desk.publish(OTHERS[7], b"x").check()
    heard = set()
    while (incoming := kitchen.receive(0.5)) is not None:
        kitchen.ack(incoming)
        heard.add(incoming.topic)
    assert heard == set(mine)
    # ... while the aggregator heard both of the desk's, and may write there, to clear what is left.
    assert {aggregator.receive(2).topic for _ in range(2)} == {OTHERS[5], OTHERS[7]}  # type: ignore[union-attr]
    aggregator.publish(OTHERS[5], b"").check()
    assert "not authorized" in aggregator.publish("anything/else", b"x").refused


def test_a_device_reads_its_own_adapters_and_not_anothers(fleet: Fleet) -> None:
    kitchen = fleet.link(fleet.join("kitchen"), "kitchen")
    kitchen.subscribe(["#"])
    for_desk = topics.topic("personal_manifest", job="notes", device="desk", version=2)
    kitchen.subscribe([for_desk, "tunefleet/1/notes/d/+/global/#", "tunefleet/1/notes/d/desk/#"])
    chunk = {"job": "notes", "version": 2, "band": "0-2", "index": 0}
    every = {
        device: [
            topics.topic(f"{kind}_{part}", device=device, **fields)
            for kind in ("personal", "trial")
            for part, fields in (("manifest", {"job": "notes", "version": 2}), ("chunk", chunk))
        ]
        for device in ("kitchen", "desk")
    }
    offered = [
        topics.topic("candidate_manifest", job="notes", version=2, number=0),
        topics.topic("candidate_chunk", **chunk, number=0),
    ]
    aggregator = fleet.aggregator()
    kept = [*every["kitchen"], *every["desk"], *offered]
    for delivery in aggregator.publish_all([(t, b"x") for t in kept], retain=True):
        delivery.check()

    def heard() -> set[str]:
        found = set()
        while (incoming := kitchen.receive(0.5)) is not None:
            kitchen.ack(incoming)
            found.add(incoming.topic)
        return found

    assert heard() == {*every["kitchen"], *offered}
    kitchen.subscribe([for_desk, "tunefleet/1/+/d/desk/trial/#"])  # what is kept is no other thing
    assert heard() == set()
    for delivery in kitchen.publish_all([(t, b"x") for t in kept], retain=True):
        assert "not authorized" in delivery.refused, delivery.topic


def test_nobody_takes_over_the_session_of_another(fleet: Fleet) -> None:
    """The client id is what the certificate says, whatever a client calls itself."""
    kitchen = fleet.link(fleet.join("kitchen"), "kitchen")
    fleet.link(fleet.join("desk"), "kitchen")
    time.sleep(0.3)
    assert kitchen.connected and kitchen.connection == 1
    kitchen.publish(topics.topic("status", **OWN), b"still here").check()


def test_nobody_gets_in_without_a_certificate(fleet: Fleet) -> None:
    address = fleet.folder.broker_for_devices
    context = client_context(fleet.folder.ca_pem())
    with (
        pytest.raises(ssl.SSLError),
        socket.create_connection((address.host, address.port), 3) as raw,
        context.wrap_socket(raw, server_hostname=address.host) as link,
    ):
        link.recv(1)
    plain = BrokerAddress(address.host, address.port, version="5")
    with pytest.raises(TransportError):
        MqttTransport(plain, "plain").connect(2)
    with pytest.raises(TlsRefused, match="not to be trusted"):
        MqttTransport(address, "stranger").connect(2)


def test_old_tls_is_refused(fleet: Fleet) -> None:
    files, address = fleet.join("kitchen"), fleet.folder.broker_for_devices
    context = files.context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        pytest.raises(ssl.SSLError, match=r"(?i)version"),
        socket.create_connection((address.host, address.port), 3) as raw,
    ):
        context.wrap_socket(raw, server_hostname=address.host)


def test_a_certificate_of_another_fleet_is_refused_on_either_side(fleet: Fleet) -> None:
    mine = fleet.join("kitchen")
    other = make_folder(fleet.devices.parent / "other")
    stranger = other.tls  # the aggregator's of another fleet, no less
    with pytest.raises(TlsRefused, match="not to be trusted"):
        fleet.link(stranger, "kitchen")
    forged = type(stranger)(mine.ca, stranger.certificate, stranger.key)
    with pytest.raises(TlsRefused, match=r"belongs to another fleet|does not take"):
        fleet.link(forged, "kitchen")


def test_a_message_over_the_limit_is_not_sent(fleet: Fleet) -> None:
    kitchen = fleet.link(fleet.join("kitchen"), "kitchen")
    large = kitchen.publish(topics.topic("status", **OWN), bytes(PACKET_BYTES))
    with pytest.raises(MessageTooLarge, match=str(PACKET_BYTES)):
        large.check()
    assert kitchen.bytes_sent == 0
