"""The link to the broker: paho-mqtt behind four verbs.

`publish` returns the broker's verdict, `receive` takes from a bounded queue, and `ack` is called
only after what a message asked for has been done and committed: until then the broker keeps it.
Callbacks of paho only enqueue, for an exception in one would kill its network thread unseen.
MQTT 5 is tried first, then 3.1.1.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from protocol.connecting import QOS, attempts, end, hang_up, knock, new_client, set_pauses
from protocol.errors import BrokerRefused, BrokerUnreachable, TlsRefused, TransportError
from protocol.inbox import Inbox
from protocol.limits import BrokerLimits
from protocol.link import REFUSED_FOR_GOOD, BrokerAddress, Delivery, Incoming, Transport, in_words
from protocol.outage import SESSION_TAKEN_OVER, Outages, why_away
from protocol.subscriptions import Subscriptions
from protocol.tls import TlsFiles, refusal
from protocol.verdicts import Verdicts

__all__ = ["BrokerAddress", "Delivery", "Incoming", "MqttTransport", "TlsFiles", "Transport"]

Meanwhile = Callable[[], object] | None
CONNECTIONS_LIMIT = 4
"""Connections that a message may be sent on again without an answer."""
TIMEOUT_S = 30.0
ABANDON_S = 5.0
"""How long who was told to stop waits on a connection, whose other end may be gone unseen."""


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
        on_outage: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Prepare a link; a `temporary` one leaves no session at the broker, nor takes one up.

        `tls` says who this client is, where the address asks for TLS. A broker may then take the
        client id from the certificate: all links of one certificate have one session. `on_outage`
        hears, on the thread that waits, why there is no connection, now and then, or a new one.

        Raises:
            CertificateUnusable: its certificate is not in order.
        """
        self._temporary = temporary
        self.address = address
        self.client_id = client_id
        self.connection = 0
        """Connections made so far: a rise tells that one was lost in between."""
        self._will = will
        self._state = threading.Condition()
        self._inbox = Inbox(self._state)
        self._verdicts = Verdicts()
        self._subscriptions = Subscriptions()
        self.limits = BrokerLimits()
        self._connected = self._refused_for_good = self._abandoned = False
        self._refused = ""
        self._outages = Outages()
        self._on_outage = on_outage
        self._announcement: tuple[str, bytes] | None = None
        self._context: ssl.SSLContext | None = None
        if address.tls:
            self._context = tls.context() if tls else ssl.create_default_context()
        self._client: paho.Client | None = None
        self.bytes_sent = self.bytes_received = 0
        """Payload bytes published and received."""

    @property
    def mqtt5(self) -> bool:
        return self._client is not None and self._client._protocol == paho.MQTTv5

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; if not, paho is trying to get one."""
        return self._connected

    def connect(self, timeout_s: float = 10.0, stopping: Callable[[], bool] = bool) -> None:
        """Connect, trying the protocol versions in turn, again if the broker hangs up.

        Raises:
            BrokerUnreachable: nobody answers there, or not before `stopping` says so.
            BrokerRefused: a broker is there and does not let this client in.
            TlsRefused: one side does not take the other's certificate; says why.
        """
        why = "no answer"
        for version, patience_s in attempts(self.address.version, timeout_s):
            client = self._new_client(version)
            knock(client, self.address, version, temporary=self._temporary)
            self._client, self._refused, self._refused_for_good = client, "", False
            client.loop_start()
            deadline = time.monotonic() + patience_s
            with self._state:
                while time.monotonic() < deadline and not (
                    self._connected or self._refused or stopping()
                ):
                    self._state.wait(0.1)
                if self._connected:
                    return
                why = self._refused or "no answer to CONNECT"
            end(client)
            words = self._context and refusal(self.address.host, self.address.port, self._context)
            if words:
                raise TlsRefused(str(self.address), words)
            if stopping():
                break
        self._client = None
        refused = BrokerRefused if self._refused_for_good else BrokerUnreachable
        raise refused(str(self.address), why)

    def subscribe(self, filters: list[str], *, as_published: bool = False) -> None:
        """Subscribe, now and after every reconnection.

        `as_published` (MQTT 5): new messages have their retained flag, and own ones stay away.

        Raises:
            TransportError: the broker did not answer in time.
            DeliveryRefused: it refuses one of them.
        """
        if not (new := self._subscriptions.add(filters, as_published=as_published)):
            return
        before = self.connection
        message_id = self._subscriptions.send(self._live(), new)
        self._expect(
            lambda: self._subscriptions.answered(message_id, before), TIMEOUT_S, "SUBSCRIBE"
        )
        self._subscriptions.check(message_id, new)

    def show_again(self, filters: list[str]) -> None:
        """Have the broker send once more what it retains under filters that are subscribed to."""
        self._subscriptions.send(self._live(), filters)

    def announce(self, topic: str, payload: bytes) -> None:
        """Publish a retained message, now and after every reconnection, until the next one.

        That puts right what the will may have said in between.

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
        self._subscriptions.drop(filters)
        if filters:
            self._live().unsubscribe(filters)

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, timeout_s: float = TIMEOUT_S
    ) -> Delivery:
        """Publish with QoS 1 and return the broker's verdict.

        Raises:
            TransportError: as `publish_all`; time without a connection does not count.
        """
        return self.publish_all([(topic, payload)], retain=retain, timeout_s=timeout_s)[0]

    def publish_all(
        self,
        messages: Iterable[tuple[str, bytes]],
        *,
        retain: bool = False,
        timeout_s: float = TIMEOUT_S,
        meanwhile: Meanwhile = None,
    ) -> list[Delivery]:
        """Publish in order with at most a window of messages in flight; return each verdict.

        `meanwhile` is called when a message has come in while a verdict is waited for, and takes
        it: who has much to say and much to hear must not let what is heard pile up.

        Raises:
            TransportError: a verdict did not come in `timeout_s` seconds, nor on new connections.
        """
        deliveries: list[Delivery] = []
        flying: deque[tuple[str, int | Delivery]] = deque()
        for topic, payload in messages:
            if len(flying) >= self.limits.window:
                deliveries.append(self._land(*flying.popleft(), timeout_s, meanwhile))
            flying.append((topic, self._send(topic, payload, retain)))
        return deliveries + [self._land(*one, timeout_s, meanwhile) for one in flying]

    def post(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish and don't wait; what the broker would not take is in `refused` later."""
        self._verdicts.watch(topic, self._send(topic, payload, retain))

    @property
    def awaited(self) -> int:
        return self._verdicts.awaited

    def refused(self) -> list[Delivery]:
        """Return what was `post`ed and has been refused since this was last asked."""
        with self._state:
            return self._verdicts.refused()

    def receive(self, timeout_s: float) -> Incoming | None:
        """Return the next message, or None when none came in time.

        Raises:
            TransportError: paho's network thread has died.
        """
        incoming = self._inbox.get(timeout_s)
        if incoming is None:
            self._live()
            self._look_after()
        return incoming

    def ack(self, incoming: Incoming) -> None:
        """Tell the broker that a message is dealt with; others come again on reconnection."""
        if incoming.connection == self.connection and incoming.message_id:
            self._live().ack(incoming.message_id, QOS)

    def close(self) -> None:
        """Disconnect in good order: the broker sends no will."""
        self._inbox.close()
        # Let go of it too: its sockets are closed when nobody holds it.
        client, self._client = self._client, None
        if client is not None:
            end(client)

    # -- on paho's thread: enqueue and signal, nothing else --------------------------------------

    def _on_connect(
        self, client: paho.Client, _: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        with self._state:
            if code.is_failure:
                self._refused = in_words(code)
                self._refused_for_good = code.value in REFUSED_FOR_GOOD
            else:
                self.connection += 1
                self._connected, self._refused = True, ""
                self._outages.made(time.monotonic())
                set_pauses(client, refused=False)
                self.limits = BrokerLimits(properties)
            self._state.notify_all()
        if code.is_failure:
            return
        self._subscriptions.renew(client)
        if self._announcement:
            client.publish(*self._announcement, qos=QOS, retain=True)

    def _on_disconnect(
        self, client: paho.Client, _: Any, __: Any, code: ReasonCode, ___: Any
    ) -> None:
        with self._state:
            if self._connected:
                self._outages.lost(time.monotonic(), code.value == SESSION_TAKEN_OVER)
            else:
                self._refused = self._refused or in_words(code)
            self._connected = False
            if self._outages.contested:
                client.disconnect()  # coming back would end the other, which would come back …
            self._state.notify_all()

    def _on_socket_close(self, *_: Any) -> None:
        """Note a broker that hangs up before CONNACK, as one without MQTT 5 may do."""
        with self._state:
            if not self._connected:
                self._refused = self._refused or "it closed the connection"
            self._state.notify_all()

    def _on_message(self, client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        if self._subscriptions.unasked(message):
            client.ack(message.mid, message.qos)
            return
        payload = bytes(message.payload)
        self.bytes_received += len(payload)
        one = Incoming(message.topic, payload, message.retain, message.mid, self.connection)
        self._inbox.put(one)

    def _on_publish(self, _: Any, __: Any, message_id: int, code: ReasonCode, ___: Any) -> None:
        with self._state:
            self._verdicts.hear(message_id, code)
            self._state.notify_all()

    def _on_subscribe(
        self, _: Any, __: Any, message_id: int, codes: list[ReasonCode], ___: Any
    ) -> None:
        with self._state:
            self._subscriptions.hear(message_id, codes, self.connection)
            self._state.notify_all()

    # -- private ---------------------------------------------------------------------------------

    def _new_client(self, version: int) -> paho.Client:
        client = new_client(
            version,
            self.client_id,
            temporary=self._temporary,
            context=self._context,
            will=self._will,
        )
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_socket_close, client.on_message = self._on_socket_close, self._on_message
        client.on_publish, client.on_subscribe = self._on_publish, self._on_subscribe
        return client

    def _live(self) -> paho.Client:
        client = self._client
        self._outages.check(self.address, self.client_id)
        if client is None or client._thread is None or not client._thread.is_alive():
            raise TransportError(f"the connection to {self.address} has ended")
        return client

    def _send(self, topic: str, payload: bytes, retain: bool) -> int | Delivery:
        """Hand a message to paho; return its id, or why the broker would not take it."""
        if too_large := self.limits.refusal(topic, payload):
            return too_large
        info = self._live().publish(topic, payload, qos=QOS, retain=retain)
        self.bytes_sent += len(payload)
        return info.mid

    def _land(
        self, topic: str, sent: int | Delivery, timeout_s: float, meanwhile: Meanwhile
    ) -> Delivery:
        """Wait for the verdict on a message."""
        if isinstance(sent, Delivery):
            return sent
        self._expect(lambda: sent in self._verdicts, timeout_s, topic, meanwhile)
        with self._state:
            return self._verdicts.take(topic, sent)

    def _expect(
        self, happened: Callable[[], bool], timeout_s: float, what: str, meanwhile: Meanwhile = None
    ) -> None:
        """Wait until something has happened; only time with a connection counts.

        Mosquitto 2.0.11 drops answers that do not fit its queue: all is said again then, on another
        connection. A broker that hangs up, or is silent, each time, is no longer waited for.
        """
        left, last = timeout_s, self.connection + CONNECTIONS_LIMIT
        while not happened():
            left = min(left, ABANDON_S) if self._abandoned else left
            given_up = self.connection >= last or (self._abandoned and not self._connected)
            over = left <= 0 and (self._abandoned or self.connection + 1 >= last)
            if over or given_up:
                raise TransportError(f"{self.address} did not answer to {what} in time")
            if left <= 0:
                self._on_outage(f"no answer to {what} in {timeout_s:g} s: connecting anew")
                hang_up(self._live())
                left = timeout_s
            self._live()
            since = time.monotonic()
            if meanwhile is not None and self._inbox:
                meanwhile()
            else:
                with nullcontext() if meanwhile else self._inbox.waiting(), self._state:
                    self._state.wait_for(
                        lambda: happened() or (meanwhile and self._inbox), min(left, 1.0)
                    )
            if self._connected:
                left -= time.monotonic() - since
            self._look_after()

    def _look_after(self) -> None:
        """Leave a swamped connection for another, on which what the broker dropped comes again.

        While a lost one is not made again ask why, seldom, and tell who wants to know.
        """
        client, now = self._client, time.monotonic()
        if client and self._connected and self._outages.settled(now) and self._inbox.swamped():
            self._on_outage("more comes from it than is taken in: connecting anew")
            hang_up(client)
        if client is None or self._connected or not self._outages.due(now):
            return
        why, refused = why_away(self.address, self._context)
        if refused:
            set_pauses(client, refused=True)
        if (why := why or self._refused) and not self._connected:
            self._on_outage(why)
