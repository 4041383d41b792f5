"""A broker that sends more than was asked for: what waits stays bounded, and nobody waits for ever.

Mosquitto 2.0.11 lets up to a window more out for each message acknowledged, so that its answer to
a publish may come behind thousands of messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.inbox import LIMIT
from protocol.transport import BrokerAddress, MqttTransport
from tests.conftest import running_mosquitto

pytestmark = pytest.mark.timeout(60)
FLOOD = 4 * LIMIT


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerAddress]:
    with running_mosquitto(tmp_path, f"max_queued_messages {4 * FLOOD}") as address:
        yield address


@pytest.fixture
def flooded(broker: BrokerAddress) -> Iterator[MqttTransport]:
    """Return a client for whom far more waits than it has room for."""
    reader, writer = MqttTransport(broker, "reader"), MqttTransport(broker, "writer")
    for link in (reader, writer):
        link.connect()
    reader.subscribe(["t/#"])
    writer.publish_all([(f"t/{n}", b"x" * 1000) for n in range(FLOOD)])
    for _ in range(10):
        incoming = reader.receive(5)
        assert incoming is not None
        reader.ack(incoming)
    time.sleep(0.5)
    yield reader
    reader.close()
    writer.close()


def rest_of(link: MqttTransport, *, have: int = 10) -> list[str]:
    found = []
    while have + len(found) < FLOOD:
        incoming = link.receive(5)
        assert incoming is not None, f"{have + len(found)} of {FLOOD}"
        link.ack(incoming)
        found.append(incoming.topic)
    return found


def test_what_waits_is_bounded_and_all_of_it_comes_in_order(flooded: MqttTransport) -> None:
    assert len(flooded._inbox) <= LIMIT
    assert rest_of(flooded) == [f"t/{n}" for n in range(10, FLOOD)]


def test_a_verdict_comes_through_a_full_inbox(flooded: MqttTransport) -> None:
    flooded.publish("answers/1", b"x", timeout_s=20).check()
    assert rest_of(flooded) == [f"t/{n}" for n in range(10, FLOOD)]


def test_what_comes_in_is_taken_while_much_goes_out(flooded: MqttTransport) -> None:
    taken: list[str] = []

    def take() -> None:
        incoming = flooded.receive(0)
        assert incoming is not None
        flooded.ack(incoming)
        taken.append(incoming.topic)
        assert len(flooded._inbox) <= LIMIT

    deliveries = flooded.publish_all(
        [(f"answers/{n}", b"x") for n in range(100)], timeout_s=20, meanwhile=take
    )
    assert not any(d.refused for d in deliveries)
    taken += rest_of(flooded, have=10 + len(taken))
    assert taken == [f"t/{n}" for n in range(10, FLOOD)]


def test_what_is_posted_is_not_waited_for(flooded: MqttTransport) -> None:
    for n in range(100):
        flooded.post(f"answers/{n}", b"x")
    assert rest_of(flooded) == [f"t/{n}" for n in range(10, FLOOD)]
    deadline = time.monotonic() + 20
    while flooded._verdicts.awaited and time.monotonic() < deadline:
        assert flooded.refused() == []
        time.sleep(0.01)
    assert not flooded._verdicts.awaited


def test_a_refusal_of_what_was_posted_is_found(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read #\ntopic write allowed/#\n")
    with running_mosquitto(tmp_path / "m", f"acl_file {rules}\nmax_packet_size 2000") as address:
        link = MqttTransport(address, "one")
        link.connect()
        link.post("allowed/a", b"x")
        link.post("forbidden/b", b"x")
        link.post("allowed/c", b"x" * 4000)
        refused: dict[str, str] = {}
        deadline = time.monotonic() + 20
        while (len(refused) < 2 or link._verdicts.awaited) and time.monotonic() < deadline:
            refused.update({d.topic: d.refused for d in link.refused()})
            time.sleep(0.01)
        link.close()
    assert set(refused) == {"forbidden/b", "allowed/c"}
    assert "not authorized" in refused["forbidden/b"]
    assert "packet limit" in refused["allowed/c"]
