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
