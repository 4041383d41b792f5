"""What a broker takes, as it says when it lets a client in."""

from __future__ import annotations

from paho.mqtt.properties import Properties

from protocol.connecting import WINDOW
from protocol.link import Delivery

_PACKET_OVERHEAD_BYTES = 16
"""More than a PUBLISH has around topic and payload."""


class BrokerLimits:
    """Read the properties of a CONNACK; a broker of MQTT 3.1.1 has none."""

    def __init__(self, properties: Properties | None = None) -> None:
        self.packet_bytes: int | None = getattr(properties, "MaximumPacketSize", None)
        self.window: int = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        """Messages in flight: fewer if the broker takes fewer at once."""

    def refusal(self, topic: str, payload: bytes) -> Delivery | None:
        """Return why the broker would not take a message; paho would retry it for ever."""
        limit = self.packet_bytes
        if limit is None or len(payload) + len(topic) + _PACKET_OVERHEAD_BYTES <= limit:
            return None
        return Delivery(topic, f"larger than the broker's packet limit ({limit})", limit)
