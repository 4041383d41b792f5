"""What a link to a broker is: its address, what comes in, what the broker said to what went out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from paho.mqtt.reasoncodes import ReasonCode

from protocol.errors import DeliveryRefused, MessageTooLarge, TransportError

MQTT_VERSIONS = ("5", "3.1.1")
"""In the order in which they are tried."""
_WORDS = {
    0x83: "it does not take this",
    0x84: "it speaks no version of MQTT that this program does",
    0x85: "it does not take this client's name",
    0x86: "wrong user or password; users are not supported yet",
    0x87: "not authorized: its access rules do not let this client do that",
    0x90: "it does not take this topic",
    0x95: "too large a packet for it",
    0x97: "a quota of it is used up",
    0x99: "it does not take this payload",
}
"""MQTT 5's reason codes in words."""
REFUSED_FOR_GOOD = frozenset({0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x9D})
"""Codes of a CONNACK that waiting does not change, the last: the broker has moved."""


def in_url(host: str) -> str:
    """Return a host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


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
        try:
            parts = urlsplit(url if "://" in url else f"mqtt://{url}")
            port = parts.port
        except ValueError:  # a port that is none, or half an IPv6 address
            raise _not_an_address(url) from None
        version = parts.query.removeprefix("version=")
        right = parts.scheme in ("mqtt", "mqtts") and (parts.hostname or "").strip() and port != 0
        if not right or version not in ("", *MQTT_VERSIONS) or parts.path not in ("", "/"):
            raise _not_an_address(url)
        if parts.username is not None:
            raise TransportError(
                f"the broker address for {parts.hostname} names a user: users and passwords are "
                "not supported yet; leave them out"
            )
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname or "", port or (8883 if tls else 1883), tls, version)

    def __str__(self) -> str:
        host = in_url(self.host)
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


def in_words(code: ReasonCode) -> str:
    """Return what a broker's reason code means."""
    return _WORDS.get(code.value, str(code).lower())


class Transport(Protocol):
    """What agents and the aggregator need of a link."""

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, timeout_s: float = 30.0
    ) -> Delivery: ...
    def receive(self, timeout_s: float) -> Incoming | None: ...
    def ack(self, incoming: Incoming) -> None: ...


class DeviceLink(Protocol):
    """What a device's part in a job needs of its link; messages come to it by whoever drives it.

    A link may wait for the broker's answers, as `MqttTransport` does, or look at them later: then
    what it returns says nothing yet, and what the broker refuses ends the device at its next turn.
    """

    @property
    def connected(self) -> bool: ...
    @property
    def connection(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    def subscribe(self, filters: list[str]) -> None: ...
    def show_again(self, filters: list[str]) -> None: ...
    def unsubscribe(self, filters: list[str]) -> None: ...
    def announce(self, topic: str, payload: bytes) -> None: ...
    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Delivery: ...
    def publish_all(
        self, messages: Iterable[tuple[str, bytes]], *, retain: bool = False
    ) -> list[Delivery]: ...
    def close(self) -> None: ...


def _not_an_address(url: str) -> TransportError:
    return TransportError(
        f"{url!r} is not a broker address; write mqtt://host:port or mqtts://host:port"
    )
