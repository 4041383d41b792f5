"""Waiting for a broker that is not up yet, and not for what waiting does not change."""

from __future__ import annotations

import gc
import io
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from protocol.broker import free_port
from protocol.errors import BrokerRefused, BrokerUnreachable, TransportError
from protocol.events import EventLog
from protocol.outage import SHORT_ONES, SHORT_S, TAKEOVERS, Outages, why_away
from protocol.patience import Waiting, connect_when_up
from protocol.transport import BrokerAddress, MqttTransport
from tests.conftest import running_mosquitto
from tests.security.fleet import LEAVES_SOCKET

pytestmark = pytest.mark.timeout(120)


class Said:
    """What is said of waiting."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.waiting = Waiting(EventLog(as_json=True, stream=self._stream))

    @property
    def reasons(self) -> list[tuple[str, str]]:
        events = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        assert {event["event"] for event in events} <= {"waiting"}
        return [(event["what"], event["why"]) for event in events]


def attempt(address: BrokerAddress, said: Said, *, wait: bool = True) -> bool:
    """Connect, and hang up; one that is still waiting is stopped once it has said so."""
    link = MqttTransport(address, "one")
    try:
        stopping = lambda: bool(said.reasons)  # noqa: E731
        return connect_when_up(link, said.waiting, stopping=stopping, wait=wait)
    finally:
        link.close()


def test_a_broker_that_comes_up_later(tmp_path: Path) -> None:
    address = BrokerAddress("127.0.0.1", free_port())
    said, link = Said(), MqttTransport(address, "one")
    made: list[bool] = []

    def wait() -> None:
        made.append(connect_when_up(link, said.waiting, stopping=lambda: False))

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        while not said.reasons:
            time.sleep(0.05)
        time.sleep(2)  # it has failed again by now
        with running_mosquitto(tmp_path, port=address.port):
            thread.join(60)
            assert made == [True]
            link.publish("t", b"x").check()
            link.close()
    finally:
        thread.join()
    assert said.reasons == [(f"the broker at {address}", "Connection refused")], "said once"


def test_who_does_not_wait_is_told_at_once() -> None:
    said = Said()
    with pytest.raises(BrokerUnreachable, match="Connection refused"):
        attempt(BrokerAddress("127.0.0.1", free_port()), said, wait=False)
    assert said.reasons == []


def test_a_name_that_is_not_known_may_become_known() -> None:
    """At boot there is no DNS yet."""
    said = Said()
    assert not attempt(BrokerAddress("no-such-host.invalid", 1883), said)
    ((_, why),) = said.reasons
    assert why.startswith("the name no-such-host.invalid is not known: ")


def test_a_broker_that_accepts_and_says_nothing_is_left_when_told_to_stop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = MqttTransport(BrokerAddress("127.0.0.1", silent.getsockname()[1]), "one")
        asked: list[float] = []

        def stopping() -> bool:
            asked.append(time.monotonic())
            return asked[-1] - asked[0] > 0.5

        said = Said()
        assert not connect_when_up(link, said.waiting, stopping=stopping)
        assert asked[-1] - asked[0] < 2.5, "no version of MQTT was waited out"


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_broker_that_wants_a_password_is_not_waited_for(tmp_path: Path, version: str) -> None:
    (tmp_path / "users").write_text("")
    said = Said()
    settings = f"password_file {tmp_path / 'users'}"
    with running_mosquitto(tmp_path / "broker", settings, anonymous=False) as address:
        asked = BrokerAddress(address.host, address.port, version=version)
        with pytest.raises(BrokerRefused, match="does not let this client in"):
            attempt(asked, said)
    assert said.reasons == []


@LEAVES_SOCKET
def test_a_port_without_tls_is_named_as_such(mosquitto: BrokerAddress) -> None:
    secure = BrokerAddress(mosquitto.host, mosquitto.port, tls=True)
    with pytest.raises(BrokerUnreachable, match="is this its port for TLS"):
        attempt(secure, Said(), wait=False)
    gc.collect()


def test_what_can_be_no_host() -> None:
    with pytest.raises(TransportError, match="can't be connected to") as caught:
        attempt(BrokerAddress("a..b", 1883), Said())
    assert not isinstance(caught.value, BrokerUnreachable)


# -- lost connections --------------------------------------------------------------------------


def test_why_a_broker_is_away(mosquitto: BrokerAddress) -> None:
    assert why_away(mosquitto, None) == ("", False)
    gone = BrokerAddress("127.0.0.1", free_port())
    assert why_away(gone, None) == ("Connection refused", False)


def test_many_short_connections_in_a_row_are_somebody_elses_doing() -> None:
    outages, now = Outages(), 0.0
    for count in range(1, SHORT_ONES + 1):
        assert not outages.contested
        outages.made(now)
        now += SHORT_S / 2
        outages.lost(now, taken_over=False)
        if count == SHORT_ONES - 1:  # a longer one in between, and all is well
            outages.made(now)
            now += 2 * SHORT_S
            outages.lost(now, taken_over=False)
    assert not outages.contested
    for _ in range(SHORT_ONES):
        outages.made(now)
        outages.lost(now, taken_over=False)
    assert "hangs up" in outages.contested


def test_a_takeover_may_be_the_others_mistake_but_not_again_and_again() -> None:
    outages, now = Outages(), 0.0
    for _ in range(TAKEOVERS):
        assert not outages.contested
        outages.made(now)
        now += 2 * SHORT_S  # none of these follows soon on the one before
        outages.lost(now, taken_over=True)
    assert not outages.contested
    for _ in range(TAKEOVERS):
        outages.made(now)
        outages.lost(now, taken_over=True)
    assert "another program" in outages.contested


def test_it_is_asked_seldom_why_a_broker_is_away() -> None:
    outages = Outages()
    outages.made(0.0)
    outages.lost(100.0, taken_over=False)
    assert not outages.due(100.1)
    asked = [now for now in range(100, 401) if outages.due(float(now))]
    assert 3 <= len(asked) <= 8
    assert asked[0] < 110


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_two_who_push_each_other_off_do_not_go_on_for_ever(
    mosquitto: BrokerAddress, version: str
) -> None:
    address = BrokerAddress(mosquitto.host, mosquitto.port, version=version)
    links = [MqttTransport(address, "kitchen") for _ in range(2)]
    ended: list[str] = []
    try:
        for link in links:
            link.connect()
        deadline = time.monotonic() + 60
        while not ended:
            assert time.monotonic() < deadline, "both come back for ever"
            for link in links:
                try:
                    link.receive(0.1)
                except TransportError as error:
                    ended.append(str(error))
        assert len(ended) == 1
        assert "'kitchen'" in ended[0] and "only one may connect by a name" in ended[0]
    finally:
        for link in links:
            link.close()
