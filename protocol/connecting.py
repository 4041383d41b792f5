"""Connecting to a broker: how a session is asked for, and what goes wrong before it answers."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from protocol.errors import BrokerUnreachable, TlsRefused, TransportError
from protocol.link import BrokerAddress
from protocol.tls import explain, socket_words

VERSIONS = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}
QOS = 1
WINDOW = 32
"""Messages in flight either way before somebody waits."""
RETRIES = 2
"""Times the last version of MQTT is tried again."""
MQTT5_PATIENCE_S = 2.5
"""How long a broker may leave an MQTT 5 CONNECT unanswered before 3.1.1 is tried."""
SESSION_EXPIRY_S = 7 * 24 * 3600
KEEPALIVE_S = 30
RECONNECT_S = 30
"""The longest pause between two attempts to get a lost connection back."""
RECONNECT_REFUSED_S = 300
"""The same, when the other side does not take the certificate: that seldom heals."""
PROPERTIES_BYTES = 4096
"""Properties of a packet above this are skipped unread; nothing here sends or needs as many."""
HUNG_UP = "it hung up when asked for TLS; is this its port for TLS, or has it too many connections?"
_HANG_UPS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError)
"""How a server ends a connection without a word."""


def _bound_properties() -> None:
    """Keep paho from reading properties without end, whoever sent them.

    Its `unpack` takes time that grows with the square of their number: a megabyte of user
    properties, which a broker hands on, held the network thread for minutes.
    """
    unpack: Any = Properties.unpack

    def bounded(self: Properties, buffer: bytes) -> tuple[Properties, int]:
        length, prefix = VariableByteIntegers.decode(buffer)
        if length > PROPERTIES_BYTES:
            self.clear()
            return self, length + prefix
        # The rest of the packet would be copied with each property.
        found: tuple[Properties, int] = unpack(self, buffer[: length + prefix])
        return found

    Properties.unpack = bounded  # type: ignore[method-assign]


_bound_properties()


def attempts(version: str, timeout_s: float) -> list[tuple[int, float]]:
    """Return with which MQTT, the given one or each, to connect, and seconds to wait for a word."""
    first, last = VERSIONS[version or "5"], VERSIONS[version or "3.1.1"]
    patient: list[tuple[int, float]] = [(last, timeout_s)] * (1 + RETRIES)
    return patient if first == last else [(first, min(timeout_s, MQTT5_PATIENCE_S)), *patient]


def new_client(
    version: int,
    client_id: str,
    *,
    temporary: bool,
    context: ssl.SSLContext | None,
    will: tuple[str, bytes] | None,
) -> paho.Client:
    """Return a client that acknowledges nothing by itself; a `temporary` one leaves no session.

    `context` is for TLS; `will` is a retained message, topic and payload.
    """
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if version == paho.MQTTv5 else temporary,
        protocol=MQTTProtocolVersion(version),
        manual_ack=True,
    )
    client.max_inflight_messages_set(WINDOW)
    set_pauses(client, refused=False)
    if context is not None:
        client.tls_set_context(context)
    if will:
        client.will_set(*will, qos=QOS, retain=True)
    return client


def knock(
    client: paho.Client,
    address: BrokerAddress,
    version: int,
    *,
    temporary: bool,
    keepalive_s: int = KEEPALIVE_S,
    window: int = WINDOW,
) -> None:
    """Reach the broker and send CONNECT; the answer comes on paho's thread, once that runs.

    Raises:
        BrokerUnreachable: nobody is there, or its name is not known.
        TlsRefused: one side does not take the other's certificate; says why.
        TransportError: the address is none that can be connected to.
    """
    arguments = _session(version, temporary=temporary, window=window)
    try:
        client.connect(address.host, address.port, keepalive_s, **arguments)
    except _HANG_UPS as error:
        why = HUNG_UP if address.tls else socket_words(error, address.host)
        raise BrokerUnreachable(str(address), why) from None
    except ssl.SSLError as error:
        raise TlsRefused(str(address), explain(error)) from None
    except OSError as error:
        raise BrokerUnreachable(str(address), socket_words(error, address.host)) from None
    except ValueError as error:
        raise TransportError(f"{address} can't be connected to: {error}") from None


def set_pauses(client: paho.Client, *, refused: bool) -> None:
    """Set the pauses between attempts to get a connection back: `refused` ones seldom heal."""
    client.reconnect_delay_set(1, RECONNECT_REFUSED_S if refused else RECONNECT_S)


def hang_up(client: paho.Client) -> None:
    """Break the connection under a client, whose thread then gets another."""
    if isinstance(raw := client.socket(), socket.socket):
        with suppress(OSError):  # it has just been closed
            socket.socket.shutdown(raw, socket.SHUT_RDWR)  # TLS's own would end it under the thread


def end(client: paho.Client) -> None:
    """Disconnect in good order and end the client's thread."""
    client.disconnect()
    with suppress(AttributeError):  # paho forgets its thread when that ends, which may be just now
        client.loop_stop()


def _session(version: int, *, temporary: bool, window: int) -> dict[str, Any]:
    """Return CONNECT's arguments for a session that outlives the connection, or does not."""
    if version != paho.MQTTv5:
        return {}
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 0 if temporary else SESSION_EXPIRY_S
    properties.ReceiveMaximum = window
    return {"clean_start": temporary, "properties": properties}
