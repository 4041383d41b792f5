"""Links on a loop: messages, wills, sessions and refusals of a real broker, without a thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from device_profiles.virtual.broker import running_broker
from protocol.link import BrokerAddress, Incoming
from protocol.loop_link import Loop, LoopLink
from protocol.transport import MqttTransport

QUIET_S = 20.0
Make = Callable[[str], tuple[LoopLink, list[Incoming]]]


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ExitStack() as stack:
        made = Loop()
        stack.callback(made.close)
        yield made


@pytest.fixture
def make(loop: Loop, mosquitto: BrokerAddress) -> Iterator[Make]:
    links: list[LoopLink] = []

    def new(name: str) -> tuple[LoopLink, list[Incoming]]:
        got: list[Incoming] = []
        link = LoopLink(
            loop, mosquitto, name, will=(f"will/{name}", b"gone"), on_message=got.append
        )
        links.append(link)
        return link, got

    yield new
    for link in links:
        link.close()


def connect(loop: Loop, *links: LoopLink) -> None:
    for link in links:
        link.connect()
    assert loop.pump_until(lambda: all(x.connected and not x.unanswered for x in links), QUIET_S)


def test_a_hundred_links_hear_each_other_with_no_thread_of_their_own(
    loop: Loop, make: Make
) -> None:
    before = threading.active_count()
    pairs = [make(f"device-{number}") for number in range(100)]
    for link, _ in pairs:
        link.subscribe(["news"])
    connect(loop, *(link for link, _ in pairs))
    pairs[0][0].publish("news", b"x" * 100_000)
    assert loop.pump_until(lambda: all(got for _, got in pairs), QUIET_S)
    assert threading.active_count() == before
    assert {got[0].payload for _, got in pairs} == {b"x" * 100_000}
    assert loop.pump_until(lambda: not pairs[0][0].unanswered, QUIET_S), "the verdict has come"


def test_who_gets_out_of_reach_leaves_a_will_and_gets_again_what_it_had_not_acknowledged(
    loop: Loop, make: Make
) -> None:
    (device, got), (other, heard) = make("device"), make("other")
    device.subscribe(["orders"])
    device.announce("status", b"here")
    other.subscribe(["will/device", "status"])
    connect(loop, device, other)
    other.publish("orders", b"one")
    assert loop.pump_until(lambda: len(got) == 1, QUIET_S)
    device.lose()
    assert loop.pump_until(lambda: any(m.payload == b"gone" for m in heard), QUIET_S)
    other.publish("orders", b"two")
    assert loop.pump_until(lambda: not other.unanswered, QUIET_S)
    assert [m.payload for m in got] == [b"one"]
    connect(loop, device)
    assert loop.pump_until(lambda: len(got) == 3, QUIET_S)
    assert [m.payload for m in got[1:]] == [b"one", b"two"], "the session was kept"
    assert device.connection == 2

    def said() -> list[bytes]:
        return [m.payload for m in heard if m.topic == "status"]

    assert loop.pump_until(lambda: said() == [b"here", b"here"], QUIET_S), "on each connection"
    for incoming in got:
        device.ack(incoming)
    loop.pump(0.1)
    device.lose()
    connect(loop, device)
    loop.pump_until(lambda: False, 0.3)
    assert len(got) == 3, "what was acknowledged does not come again"


def test_who_leaves_in_good_order_leaves_no_will(loop: Loop, make: Make) -> None:
    (device, _), (other, heard) = make("device"), make("other")
    other.subscribe(["will/device", "end"])
    connect(loop, device, other)
    device.close()
    other.publish("end", b"")
    assert loop.pump_until(lambda: bool(heard), QUIET_S)
    assert [m.topic for m in heard] == ["end"]


@pytest.mark.parametrize("leave", [LoopLink.lose, LoopLink.close])
def test_who_leaves_at_once_has_said_all_and_what_the_broker_says_is_counted(
    loop: Loop, make: Make, leave: Callable[[LoopLink], None]
) -> None:
    (device, _), (other, heard) = make("device"), make("other")
    device.subscribe(["part/#"])  # the broker answers each, and sends it back
    other.subscribe(["will/device", "part/#"])
    connect(loop, device, other)
    before = loop.published
    for number in range(100):
        device.publish(f"part/{number}", b"x" * 20_000)
    leave(device)
    other.publish("part/end", b"")
    assert loop.pump_until(lambda: len(heard) >= loop.published - before, QUIET_S)
    loop.pump_until(lambda: False, 0.1)
    wills = [m for m in heard if m.topic == "will/device"]
    assert len(heard) == 101 + len(wills) == loop.published - before
    assert len(wills) == (leave is LoopLink.lose)


def test_what_is_acknowledged_just_before_the_connection_is_lost_does_not_come_again(
    loop: Loop, make: Make
) -> None:
    (device, got), (other, _) = make("device"), make("other")
    device.subscribe(["orders"])
    connect(loop, device, other)
    for number in range(20):
        other.publish("orders", str(number).encode())
    assert loop.pump_until(lambda: len(got) == 20, QUIET_S)
    for incoming in got:
        device.ack(incoming)
    device.lose()
    connect(loop, device)
    loop.pump_until(lambda: False, 0.3)
    assert len(got) == 20


def test_a_broker_that_hangs_is_waited_for_once(tmp_path: Path, loop: Loop) -> None:
    with running_broker("", tmp_path, 20) as broker:
        links = [
            LoopLink(loop, broker.address, f"d{n}", will=("will", b""), on_message=lambda m: None)
            for n in range(20)
        ]
        connect(loop, *links)
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            loop.patience_s = 0.5
            links[0].publish("part", b"x")
            for link in links:
                link.close()
            assert loop.patience_s == 0, "nobody waits after the first"
            assert "unanswered" in links[0].failure
        finally:
            os.kill(broker.pid, signal.SIGCONT)


def test_what_the_broker_refuses_is_known_afterwards(
    loop: Loop, mosquitto_read_only: BrokerAddress
) -> None:
    link = LoopLink(
        loop, mosquitto_read_only, "device", will=("will", b""), on_message=lambda m: None
    )
    connect(loop, link)
    link.publish("open/here", b"x")
    assert loop.pump_until(lambda: not link.unanswered, QUIET_S) and not link.failure
    link.publish("closed/here", b"x")
    assert loop.pump_until(lambda: not link.unanswered, QUIET_S)
    assert "not authorized" in link.failure
    link.close()


def test_a_link_on_a_loop_and_one_with_a_thread_understand_each_other(
    loop: Loop, make: Make, mosquitto: BrokerAddress
) -> None:
    device, got = make("device")
    device.subscribe(["ask"])
    connect(loop, device)
    other = MqttTransport(mosquitto, "other")
    other.connect()
    other.subscribe(["answer"])
    other.publish("ask", b"?").check()
    assert loop.pump_until(lambda: bool(got), QUIET_S)
    device.ack(got[0])
    device.publish("answer", b"!")
    assert loop.pump_until(lambda: not device.unanswered, QUIET_S)
    answer = other.receive(QUIET_S)
    assert answer is not None and answer.payload == b"!"
    other.close()
