"""Links that are there and carry nothing."""

from __future__ import annotations

import threading
import time

import pytest

from protocol.errors import TransportError
from protocol.transport import BrokerAddress, MqttTransport
from tests.faults.link import BadLink


def test_who_is_told_to_stop_does_not_wait_long_on_a_half_open_link(
    mosquitto: BrokerAddress,
) -> None:
    with BadLink(mosquitto.port) as bad:
        link = MqttTransport(BrokerAddress.parse(bad.url), "device")
        link.connect()
        assert not link.publish("t", b"good").refused
        bad.go_silent()
        began = time.monotonic()
        threading.Timer(0.5, link.abandon).start()
        with pytest.raises(TransportError, match="did not answer"):
            link.publish("t", b"into nothing", timeout_s=120)
        assert time.monotonic() - began < 60
        link.close()


@pytest.mark.parametrize("what", ["publish", "subscribe"])
def test_what_gets_no_answer_is_said_again_on_another_connection(
    what: str, mosquitto: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.transport.TIMEOUT_S", 1.0)
    told: list[str] = []
    with BadLink(mosquitto.port) as bad:
        link = MqttTransport(BrokerAddress.parse(bad.url), "device", on_outage=told.append)
        link.connect()
        bad.go_silent()
        if what == "publish":
            link.publish("t", b"again", timeout_s=1.0).check()
        else:
            link.subscribe(["t"])
            link.publish("t", b"again").check()
            incoming = link.receive(5)
            assert incoming is not None and incoming.payload == b"again"
        assert link.connection == 2
        assert len(told) == 1 and "connecting anew" in told[0]
        link.close()
