"""The link to the broker: paho-mqtt behind four verbs.

`publish` returns the broker's verdict, `receive` takes from a bounded queue, and `ack` is called
only after what a message asked for has been done and committed: until then the broker keeps it.
Callbacks of paho only enqueue, for an exception in one would kill its network thread unseen.
MQTT 5 is tried first, then 3.1.1.
"""

from __future__ import annotations

import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from protocol.errors import BrokerUnreachable, DeliveryRefused, TlsRefused, TransportError
from protocol.link import BrokerAddress, Delivery, Incoming, Transport, in_words
from protocol.tls import TlsFiles, explain, refusal

__all__ = ["BrokerAddress", "Delivery", "Incoming", "MqttTransport", "TlsFiles", "Transport"]

QOS = 1
WINDOW = 32
"""Messages in flight either way before somebody waits."""
QUEUE_LIMIT = 256
SESSION_EXPIRY_S = 7 * 24 * 3600
KEEPALIVE_S = 30
CONNECTIONS_LIMIT = 4
"""Connections that a message may be sent on again without an answer."""
RETRIES = 2
ABANDON_S = 5.0
"""How long who was told to stop waits on a connection, whose other end may be gone unseen."""
SESSION_TAKEN_OVER = 0x8E
"""MQTT 5's reason for hanging up on a client when another one connects with its id."""
MQTT5_PATIENCE_S = 2.5
"""How long a broker may leave an MQTT 5 CONNECT unanswered before 3.1.1 is tried."""

_VERSIONS = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}
_PACKET_OVERHEAD_BYTES = 16
"""More than a PUBLISH has around topic and payload."""


class MqttTransport:
    """Connect to a broker with a persistent session and keep the connection up."""

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
        tls: TlsFiles | None = None,
        temporary: bool = False,
    ) -> None:
        """Prepare a link; a `temporary` one leaves no session at the broker, nor takes one up.

        `tls` says who this client is, where the address asks for TLS. A broker may then take the
        client id from the certificate: all links of one certificate have one session.

        Raises:
            CertificateUnusable: its certificate is not in order.
        """
        self._temporary = temporary
        self.address = address
        self.client_id = client_id
        self.connection = 0
        """Connections made so far: a rise tells that one was lost in between."""
        self._will = will
        version = address.version
        self._versions = [_VERSIONS[version]] if version else list(_VERSIONS.values())
        self._incoming: queue.Queue[Incoming] = queue.Queue(QUEUE_LIMIT)
        self._filters: list[str] = []
        self._state = threading.Condition()
        self._verdicts: dict[int, ReasonCode] = {}
        self._granted: dict[int, str] = {}
        """Answered SUBSCRIBEs → why the broker refuses, or empty."""
        self._resubscription: int | None = None
        self._resubscribed = 0
        self._connected = False
        self._refused = ""
        self._taken_over = False
        self._abandoned = False
        self._announcement: tuple[str, bytes] | None = None
        self._packet_limit: int | None = None
        self._window = WINDOW
        """Messages in flight: fewer if the broker takes fewer at once."""
        self._context: ssl.SSLContext | None = None
        if address.tls:
            self._context = tls.context() if tls else ssl.create_default_context()
        self._closed = threading.Event()
        self._client: paho.Client | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        """Payload bytes published and received."""

    @property
    def mqtt5(self) -> bool:
        return self._client is not None and self._client._protocol == paho.MQTTv5

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; if not, paho is trying to get one."""
        return self._connected

    def connect(self, timeout_s: float = 10.0) -> None:
        """Connect, trying the protocol versions in turn, again if the broker hangs up.

        Raises:
            BrokerUnreachable: nobody answers there, or the broker refuses every version.
            TlsRefused: one side does not take the other's certificate; says why.
        """
        why = "no answer"
        for version in [*self._versions, *self._versions[-1:] * RETRIES]:
            client = self._new_client(version)
            try:
                client.connect(
                    self.address.host, self.address.port, KEEPALIVE_S, **self._start(version)
                )
            except ssl.SSLError as error:
                raise TlsRefused(str(self.address), explain(error)) from None
            except (OSError, ValueError) as error:
                raise BrokerUnreachable(str(self.address), str(error) or repr(error)) from None
            self._client, self._refused = client, ""
            client.loop_start()
            last = version == self._versions[-1]
            deadline = time.monotonic() + (timeout_s if last else min(timeout_s, MQTT5_PATIENCE_S))
            with self._state:
                while not self._connected and not self._refused and time.monotonic() < deadline:
                    self._state.wait(0.1)
                if self._connected:
                    return
                why = self._refused or "no answer to CONNECT"
            client.disconnect()
            client.loop_stop()
            if self._context is not None and (
                words := refusal(self.address.host, self.address.port, self._context)
            ):
                raise TlsRefused(str(self.address), words)
        self._client = None
        raise BrokerUnreachable(str(self.address), why)

    def subscribe(self, filters: list[str], timeout_s: float = 30.0) -> None:
        """Subscribe, now and after every reconnection.

        Raises:
            TransportError: the broker did not answer in time.
            DeliveryRefused: it refuses one of them.
        """
        new = [f for f in filters if f not in self._filters]
        self._filters += new
        if not new:
            return
        before = self.connection
        _, message_id = self._live().subscribe([(f, QOS) for f in new])
        self._expect(
            # ... or a later connection, on which everything is subscribed to again
            lambda: message_id in self._granted or self._resubscribed > before,
            timeout_s,
            "SUBSCRIBE",
        )
        if why := self._granted.get(message_id or 0):
            raise DeliveryRefused(", ".join(new), why)

    def announce(self, topic: str, payload: bytes) -> None:
        """Publish a retained message, now and after every reconnection, until the next one.

        Without a connection it goes out with the next. What the will may have said in between is
        so put right by a client that is busy with other things.

        Raises:
            TransportError: the broker did not answer in time.
            DeliveryRefused: it refused the message.
        """
        self._announcement = (topic, payload)
        if self._connected:
            self.publish(topic, payload, retain=True).check()

    def abandon(self) -> None:
        """Let nobody wait for a broker that is away any longer: who waits gets a TransportError.

        It may be called from a signal handler. With a connection an answer has ABANDON_S left.
        """
        self._abandoned = True

    def unsubscribe(self, filters: list[str]) -> None:
        """Stop receiving what `filters` named."""
        self._filters = [f for f in self._filters if f not in filters]
        if filters:
            self._live().unsubscribe(filters)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, timeout_s: float = 30.0
    ) -> Delivery:
        """Publish with QoS 1 and return the broker's verdict.

        Raises:
            TransportError: the broker did not answer in time; paho goes on trying. Time without
                a connection does not count, for on the next one everything is sent again.
        """
        return self.publish_all([(topic, payload)], retain=retain, timeout_s=timeout_s)[0]

    def publish_all(
        self,
        messages: Iterable[tuple[str, bytes]],
        *,
        retain: bool = False,
        timeout_s: float = 30.0,
    ) -> list[Delivery]:
        """Publish in order with at most a window of messages in flight; return each verdict.

        Raises:
            TransportError: a verdict did not come in `timeout_s` seconds.
        """
        deliveries: list[Delivery] = []
        flying: list[tuple[str, int | None]] = []
        for topic, payload in messages:
            if len(flying) >= self._window:
                deliveries.append(self._land(*flying.pop(0), timeout_s))
            flying.append((topic, self._send(topic, payload, retain)))
        return deliveries + [self._land(*one, timeout_s) for one in flying]

    def receive(self, timeout_s: float) -> Incoming | None:
        """Return the next message, or None when none came in time.

        Raises:
            TransportError: paho's network thread has died.
        """
        try:
            return self._incoming.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            self._live()
            return None

    def ack(self, incoming: Incoming) -> None:
        """Tell the broker that a message is dealt with; others come again on reconnection."""
        if incoming.connection == self.connection and incoming.message_id:
            self._live().ack(incoming.message_id, QOS)

    def close(self) -> None:
        """Disconnect in good order: the broker sends no will."""
        self._closed.set()
        # Let go of it too: its sockets are closed when nobody holds it.
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client.loop_stop()

    # -- on paho's thread: enqueue and signal, nothing else --------------------------------------

    def _on_connect(
        self, client: paho.Client, _: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        with self._state:
            if code.is_failure:
                self._refused = str(code)
            else:
                self.connection += 1
                self._connected = True
                self._packet_limit = getattr(properties, "MaximumPacketSize", None)
                self._window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
            self._state.notify_all()
        if not code.is_failure and self._filters:
            _, self._resubscription = client.subscribe([(f, QOS) for f in self._filters])
        if not code.is_failure and self._announcement:
            client.publish(*self._announcement, qos=QOS, retain=True)

    def _on_disconnect(
        self, client: paho.Client, _: Any, __: Any, code: ReasonCode, ___: Any
    ) -> None:
        with self._state:
            self._connected = False
            self._refused = self._refused or str(code)
            if code.value == SESSION_TAKEN_OVER:
                self._taken_over = True
                client.disconnect()  # coming back would end the other, which would come back …
            self._state.notify_all()

    def _on_socket_close(self, *_: Any) -> None:
        """Note a broker that hangs up before CONNACK, as one without MQTT 5 may do."""
        with self._state:
            if not self._connected:
                self._refused = self._refused or "it closed the connection"
            self._state.notify_all()

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:
        self.bytes_received += len(message.payload)
        one = Incoming(
            message.topic, bytes(message.payload), message.retain, message.mid, self.connection
        )
        while not self._closed.is_set():
            try:
                self._incoming.put(one, timeout=0.5)
                return
            except queue.Full:
                continue

    def _on_publish(self, _: Any, __: Any, message_id: int, code: ReasonCode, ___: Any) -> None:
        with self._state:
            self._verdicts[message_id] = code
            self._state.notify_all()

    def _on_subscribe(
        self, _: Any, __: Any, message_id: int, codes: list[ReasonCode], ___: Any
    ) -> None:
        with self._state:
            self._granted[message_id] = next((in_words(c) for c in codes if c.is_failure), "")
            if message_id == self._resubscription:
                self._resubscribed = self.connection
            self._state.notify_all()

    # -- private ---------------------------------------------------------------------------------

    def _new_client(self, version: int) -> paho.Client:
        clean = None if version == paho.MQTTv5 else self._temporary
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            clean_session=clean,
            protocol=MQTTProtocolVersion(version),
            manual_ack=True,
        )
        client.max_inflight_messages_set(WINDOW)
        client.reconnect_delay_set(1, 30)
        if self._context is not None:
            client.tls_set_context(self._context)
        if self._will:
            client.will_set(self._will[0], self._will[1], qos=QOS, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_socket_close = self._on_socket_close
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def _start(self, version: int) -> dict[str, Any]:
        """Return CONNECT's arguments for a session that outlives the connection, or does not."""
        if version != paho.MQTTv5:
            return {}
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0 if self._temporary else SESSION_EXPIRY_S
        properties.ReceiveMaximum = WINDOW
        return {"clean_start": self._temporary, "properties": properties}

    def _live(self) -> paho.Client:
        client = self._client
        if self._taken_over:
            raise TransportError(
                f"another program has connected to {self.address} as {self.client_id!r}; only one "
                "may: end the other, or give one of them another name"
            )
        if client is None or client._thread is None or not client._thread.is_alive():
            raise TransportError(f"the connection to {self.address} has ended")
        return client

    def _send(self, topic: str, payload: bytes, retain: bool) -> int | None:
        """Hand a message to paho; return its id, or None when the broker would not take it."""
        limit = self._packet_limit
        if limit is not None and len(payload) + len(topic) + _PACKET_OVERHEAD_BYTES > limit:
            return None  # paho would retry it for ever
        info = self._live().publish(topic, payload, qos=QOS, retain=retain)
        self.bytes_sent += len(payload)
        return info.mid

    def _land(self, topic: str, message_id: int | None, timeout_s: float) -> Delivery:
        """Wait for the verdict on a message."""
        if message_id is None:
            why = f"larger than the broker's packet limit ({self._packet_limit})"
            return Delivery(topic, why, self._packet_limit)
        self._expect(lambda: message_id in self._verdicts, timeout_s, topic)
        with self._state:
            code = self._verdicts.pop(message_id)
        return Delivery(topic, in_words(code) if code.is_failure else "")

    def _expect(self, happened: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something has happened; only time with a connection counts.

        A broker that hangs up at what is said, each time it is said again, is no longer waited for.
        """
        left, last = timeout_s, self.connection + CONNECTIONS_LIMIT
        with self._state:
            while not happened():
                left = min(left, ABANDON_S) if self._abandoned else left
                given_up = self.connection >= last or (self._abandoned and not self._connected)
                if left <= 0 or given_up:
                    raise TransportError(f"{self.address} did not answer to {what} in time")
                self._live()
                since = time.monotonic()
                self._state.wait(min(left, 1.0))
                if self._connected:
                    left -= time.monotonic() - since
