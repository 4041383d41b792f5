"""What a link to a broker is: its address, what comes in, what the broker said to what went out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from protocol.errors import DeliveryRefused, MessageTooLarge, TransportError

MQTT_VERSIONS = ("5", "3.1.1")
"""In the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens; written mqtt://host:port, or mqtts:// for TLS.

    `?version=3.1.1` or `?version=5` at its end says which MQTT it speaks; without it both are
    tried, which takes a moment with a broker that leaves MQTT 5 unanswered.
    """

    host: str
    port: int
    tls: bool = False
    version: str = ""

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Read a URL.

        Raises:
            TransportError: it is not mqtt[s]://host[:port][?version=5|3.1.1].
        """
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        version = parts.query.removeprefix("version=")
        right = parts.scheme in ("mqtt", "mqtts") and parts.hostname and port != -1
        if not right or version not in ("", *MQTT_VERSIONS):
            raise TransportError(
                f"{url!r} is not a broker address; write mqtt://host:port or mqtts://host:port"
            )
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname or "", port or (8883 if tls else 1883), tls, version)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        version = f"?version={self.version}" if self.version else ""
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}{version}"


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from the broker; `connection` counts the connections up to its own."""

    topic: str
    payload: bytes
    retained: bool
    message_id: int
    connection: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the broker said to a publish: `refused` is empty, or its reason."""

    topic: str
    refused: str = ""
    packet_limit: int | None = None
    """The broker's limit in bytes, for a message that was over it and has not been sent."""

    def check(self) -> None:
        """Raise DeliveryRefused unless the broker took the message.

        Raises:
            MessageTooLarge: it is over the broker's packet limit.
            DeliveryRefused: the broker refused it; says why.
        """
        if self.packet_limit is not None:
            raise MessageTooLarge(self.topic, self.packet_limit)
        if self.refused:
            raise DeliveryRefused(self.topic, self.refused)


class Transport(Protocol):
    """What agents and the aggregator need of a link."""

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, timeout_s: float = 30.0
    ) -> Delivery: ...
    def receive(self, timeout_s: float) -> Incoming | None: ...
    def ack(self, incoming: Incoming) -> None: ...
