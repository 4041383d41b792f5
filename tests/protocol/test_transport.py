"""The link to a broker: the embedded one, and a real mosquitto with MQTT 5."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from protocol.broker import EmbeddedBroker, free_port
from protocol.connecting import WINDOW
from protocol.errors import BrokerUnreachable, DeliveryRefused, MessageTooLarge, TransportError
from protocol.transport import BrokerAddress, Incoming, MqttTransport
from tests.conftest import running_mosquitto

Connect = Callable[..., MqttTransport]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect clients that are closed at the end of the test."""
    open_ones: list[MqttTransport] = []

    def make(address: BrokerAddress, client_id: str, **options: tuple[str, bytes]) -> MqttTransport:
        link = MqttTransport(address, client_id, **options)
        open_ones.append(link)
        link.connect()
        return link

    yield make
    for link in open_ones:
        link.close()


@pytest.fixture
def embedded() -> Iterator[BrokerAddress]:
    with EmbeddedBroker() as broker:
        yield broker.address


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest) -> BrokerAddress:
    address: BrokerAddress = request.getfixturevalue(request.param)
    return address


def taken(link: MqttTransport, count: int, timeout_s: float = 5.0) -> list[Incoming]:
    """Receive and acknowledge `count` messages."""
    found: list[Incoming] = []
    while len(found) < count:
        incoming = link.receive(timeout_s)
        assert incoming is not None, f"{len(found)} messages of {count}"
        link.ack(incoming)
        found.append(incoming)
    return found


def hang_up(link: MqttTransport) -> None:
    """Cut the connection under a client, as a lost link does."""
    assert link._client is not None
    raw = link._client.socket()
    assert raw is not None
    raw.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]


def test_what_others_subscribed_to_is_not_received(broker: BrokerAddress, connect: Connect) -> None:
    """The embedded broker shows it to each new session, unasked."""
    one = connect(broker, "one")
    one.subscribe(["d/+"])
    for topic in ("d/a", "d/b"):
        one.publish(topic, b"x", retain=True).check()
    taken(one, 2)
    other = connect(broker, "other")
    other.subscribe(["d/a"])
    one.publish("d/b", b"y", retain=True).check()
    found = {other.receive(5)}
    while (incoming := other.receive(0.5)) is not None:
        found.add(incoming)
    assert {incoming.topic for incoming in found if incoming} == {"d/a"}


def test_round_trip(broker: BrokerAddress, connect: Connect) -> None:
    one, other = connect(broker, "one"), connect(broker, "other")
    other.subscribe(["t/+"])
    delivery = one.publish("t/a", b"hello")
    delivery.check()
    assert (delivery.topic, delivery.refused) == ("t/a", "")
    (incoming,) = taken(other, 1)
    assert (incoming.topic, incoming.payload, incoming.retained) == ("t/a", b"hello", False)
    assert (one.bytes_sent, other.bytes_received) == (5, 5)
    assert other.receive(0.05) is None


def test_retained_messages_wait_for_who_comes_later(
    broker: BrokerAddress, connect: Connect
) -> None:
    one = connect(broker, "one")
    for payload in (b"old", b"new"):
        one.publish("t/kept", payload, retain=True).check()
    one.publish("t/gone", b"x").check()
    late = connect(broker, "late")
    late.subscribe(["t/#"])
    (incoming,) = taken(late, 1)
    assert (incoming.payload, incoming.retained) == (b"new", True)
    assert late.receive(0.1) is None


def test_a_chunk_is_taken_whole(broker: BrokerAddress, connect: Connect) -> None:
    one = connect(broker, "one")
    one.subscribe(["t/chunk"])
    payload = bytes(range(256)) * 512
    one.publish("t/chunk", payload).check()
    assert taken(one, 1)[0].payload == payload


def test_more_than_the_window_goes_out_and_comes_in_order(
    mosquitto: BrokerAddress, connect: Connect
) -> None:
    one, other = connect(mosquitto, "one"), connect(mosquitto, "other")
    other.subscribe(["t/+"])
    messages = [(f"t/{n}", str(n).encode()) for n in range(3 * WINDOW)]
    deliveries = one.publish_all(messages)
    assert [d.topic for d in deliveries] == [t for t, _ in messages]
    assert not any(d.refused for d in deliveries)
    assert [(i.topic, i.payload) for i in taken(other, len(messages))] == messages


def test_unsubscribing_ends_it(mosquitto: BrokerAddress, connect: Connect) -> None:
    one = connect(mosquitto, "one")
    one.subscribe(["t/a", "t/b"])
    one.subscribe(["t/a"])  # once is enough
    one.unsubscribe(["t/a"])
    one.publish("t/a", b"a").check()
    one.publish("t/b", b"b").check()
    assert [i.topic for i in taken(one, 1)] == ["t/b"]
    assert one.receive(0.1) is None


def test_mosquitto_is_spoken_to_in_mqtt_5_and_in_3_1_1_when_asked(
    mosquitto: BrokerAddress, connect: Connect
) -> None:
    assert connect(mosquitto, "five").mqtt5
    old = BrokerAddress(mosquitto.host, mosquitto.port, version="3.1.1")
    link = connect(old, "three")
    assert not link.mqtt5
    link.publish("t", b"x").check()


def test_what_was_not_acknowledged_comes_again(mosquitto: BrokerAddress, connect: Connect) -> None:
    """A device that dies between taking a message and doing what it asks is asked again."""
    sender, device = connect(mosquitto, "sender"), connect(mosquitto, "device")
    device.subscribe(["t/+"])
    sender.publish("t/1", b"1").check()
    sender.publish("t/2", b"2").check()
    first = device.receive(5)
    assert first is not None
    device.ack(first)
    assert device.receive(5) is not None  # taken, never acknowledged
    device.close()
    sender.publish("t/3", b"3").check()  # while it is away
    again = connect(mosquitto, "device")
    again.subscribe(["t/+"])
    assert [i.topic for i in taken(again, 2)] == ["t/2", "t/3"]
    again.close()
    third = connect(mosquitto, "device")
    assert third.receive(0.2) is None


def test_an_ack_for_an_earlier_connection_is_dropped(
    mosquitto: BrokerAddress, connect: Connect
) -> None:
    link = connect(mosquitto, "one")
    link.ack(Incoming("t", b"", False, 1, link.connection - 1))
    link.publish("t", b"x").check()


def test_the_will_speaks_for_a_client_that_is_gone_and_not_for_one_that_left(
    mosquitto: BrokerAddress, connect: Connect
) -> None:
    watcher = connect(mosquitto, "watcher")
    watcher.subscribe(["will/+"])
    connect(mosquitto, "polite", will=("will/polite", b"gone")).close()
    lost = connect(mosquitto, "lost", will=("will/lost", b"gone"))
    hang_up(lost)
    assert [i.topic for i in taken(watcher, 1)] == ["will/lost"]


def test_a_lost_connection_is_made_again_with_its_subscriptions(
    mosquitto: BrokerAddress, connect: Connect
) -> None:
    sender, device = connect(mosquitto, "sender"), connect(mosquitto, "device")
    device.subscribe(["t/+"])
    sender.publish("t/1", b"1").check()
    before = device.receive(5)
    assert before is not None
    hang_up(device)
    sender.publish("t/2", b"2").check()
    # The one that was not acknowledged comes again, with the number of the new connection.
    again = taken(device, 2)
    assert [i.topic for i in again] == ["t/1", "t/2"]
    assert {i.connection for i in again} == {device.connection} == {2}
    device.ack(before)  # of the first connection: dropped
    device.publish("t/3", b"3").check()
    assert [i.topic for i in taken(device, 1)] == ["t/3"]


def test_a_message_above_the_packet_limit_is_refused_before_it_is_sent(
    mosquitto_small: BrokerAddress, connect: Connect
) -> None:
    one = connect(mosquitto_small, "one")
    assert one.mqtt5
    small, large, after = one.publish_all([("t/s", b"x"), ("t/l", bytes(5000)), ("t/s", b"y")])
    assert (small.refused, after.refused) == ("", "")
    assert "4000" in large.refused
    with pytest.raises(MessageTooLarge, match="t/l") as caught:
        large.check()
    assert caught.value.limit_bytes == 4000
    assert one.bytes_sent == 2
    assert one.connection == 1


def test_a_broker_that_takes_few_messages_at_once_gets_no_more(
    tmp_path: Path, connect: Connect
) -> None:
    with running_mosquitto(tmp_path, "max_inflight_messages 2") as address:
        one = connect(address, "one")
        assert one.limits.window == 2
        assert not any(d.refused for d in one.publish_all([("t", b"x")] * 10))


def test_a_message_that_the_broker_refuses_gets_its_reason(
    mosquitto_read_only: BrokerAddress, connect: Connect
) -> None:
    one = connect(mosquitto_read_only, "one")
    one.publish("open/a", b"x").check()
    delivery = one.publish("shut/a", b"x")
    assert delivery.refused.startswith("not authorized")
    with pytest.raises(DeliveryRefused, match="shut/a"):
        delivery.check()
    one.publish("open/a", b"the link is up still").check()


def test_a_broker_that_hangs_up_on_a_message_is_an_error_in_time(
    mosquitto_strict: BrokerAddress, connect: Connect
) -> None:
    """mosquitto's old message_size_limit answers with a reason code that MQTT 5 has not there.

    paho hangs up at that and sends the message again: no verdict comes, and no hang either.
    """
    one = connect(mosquitto_strict, "one")
    one.publish("t/s", bytes(3000)).check()
    with pytest.raises(TransportError, match="t/l"):
        one.publish("t/l", bytes(5000), timeout_s=0.5)


def test_nobody_at_the_address() -> None:
    address = BrokerAddress("127.0.0.1", free_port())
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match=f"127.0.0.1:{address.port}") as caught:
        MqttTransport(address, "one").connect()
    assert time.monotonic() - began < 5
    assert "--broker" in str(caught.value)


def test_a_broker_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = BrokerAddress("127.0.0.1", silent.getsockname()[1], version="5")
        with pytest.raises(BrokerUnreachable):
            MqttTransport(address, "one").connect(timeout_s=0.3)


def test_a_link_that_was_never_made_says_so() -> None:
    link = MqttTransport(BrokerAddress("127.0.0.1", 1), "one")
    with pytest.raises(TransportError, match="has ended"):
        link.publish("t", b"x")
    with pytest.raises(TransportError, match="has ended"):
        link.receive(0.01)
    link.close()


def test_a_port_that_is_taken(embedded: BrokerAddress) -> None:
    with pytest.raises(TransportError, match="--broker"):
        EmbeddedBroker(port=embedded.port).start()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://host", BrokerAddress("host", 1883)),
        ("host:1884", BrokerAddress("host", 1884)),
        ("mqtts://host", BrokerAddress("host", 8883, tls=True)),
        ("mqtt://[::1]:1885", BrokerAddress("::1", 1885)),
        ("mqtt://host:1?version=3.1.1", BrokerAddress("host", 1, version="3.1.1")),
        ("mqtts://host:2?version=5", BrokerAddress("host", 2, tls=True, version="5")),
    ],
)
def test_addresses(url: str, address: BrokerAddress) -> None:
    assert BrokerAddress.parse(url) == address
    assert BrokerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "url", ["", "mqtt://", "http://host", "mqtt://host:x", "mqtt://host:99999", "host?version=4"]
)
def test_what_is_not_an_address(url: str) -> None:
    with pytest.raises(TransportError, match="not a broker address"):
        BrokerAddress.parse(url)


def test_properties_without_end_are_skipped_unread() -> None:
    """paho would take minutes for a packet that a broker hands on, whoever sent it."""
    few, many = b"\x26\x00\x01a\x00\x01b", b"\x26\x00\x00\x00\x00" * 200_000
    read, used = Properties(PacketTypes.PUBLISH).unpack(bytes([len(few)]) + few + b"payload")
    assert (read.UserProperty, used) == ([("a", "b")], 1 + len(few))
    prefix = VariableByteIntegers.encode(len(many))
    skipped, used = Properties(PacketTypes.PUBLISH).unpack(prefix + many + b"payload")
    assert not hasattr(skipped, "UserProperty") and used == len(prefix) + len(many)
