"""What a device offers and sends of its outbox, heard at a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.outbox import Outbox
from edge_client.sender import Sender
from protocol.events import EventLog
from protocol.messages import UploadManifest, describe_file, upload_id
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport


@pytest.fixture
def links(mosquitto: BrokerAddress) -> Iterator[tuple[MqttTransport, MqttTransport]]:
    """Return a device's link, and one that hears what it sends."""
    device, listener = (MqttTransport(mosquitto, name) for name in ("device", "listener"))
    device.connect()
    listener.connect()
    listener.subscribe(["tunefleet/1/small/d/kitchen/up/#"])
    yield device, listener
    device.close()
    listener.close()


def test_what_was_asked_for_before_a_restart_is_neither_sent_nor_taken_for_an_answer(
    links: tuple[MqttTransport, MqttTransport], tmp_path: Path
) -> None:
    """The last life's `need` asks for what may be in, and leaves out what was lost with it."""
    link, listener = links
    data = bytes(300_000)
    manifest = UploadManifest(
        job="small",
        device="kitchen",
        upload=upload_id("kitchen", "small", 1),
        round=1,
        version=1,
        rank=2,
        rank_trained=2,
        held=2,
        encoding="f32",
        file=describe_file(data),
        examples=100,
    )
    outbox = Outbox(tmp_path)
    outbox.put(manifest, data, rank=2)
    pending = outbox.get(manifest.upload)
    assert pending is not None
    sender = Sender(
        link, SigningKey.load_or_create(tmp_path / "key"), outbox, EventLog(as_json=True)
    )
    sender.send_chunks(pending, [2])
    sender.offer(manifest.upload)
    sender.send_chunks(pending, [0])
    sender.offer(manifest.upload)  # within the time that an answer may take
    heard = []
    while (incoming := listener.receive(1.0)) is not None:
        listener.ack(incoming)
        heard.append(incoming.topic.rpartition("/")[2])
    outbox.close()
    assert heard == ["manifest", "0"]
