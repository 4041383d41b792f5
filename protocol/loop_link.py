"""Many links on one thread: paho driven by its socket callbacks, from one loop that never waits.

A link here publishes and subscribes at once and hears the broker's answers later, when the loop is
pumped: what a broker refuses is in `LoopLink.failure` then. So thousands of devices of a replay are
connected without a thread each. paho keeps what is in flight; this keeps nothing over connections.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from protocol.connecting import QOS, VERSIONS, knock, new_client
from protocol.errors import TransportError
from protocol.limits import BrokerLimits
from protocol.link import BrokerAddress, Delivery, Incoming, in_words
from protocol.subscriptions import Subscriptions

KEEPALIVE_S = 0xFFFF
"""Nobody has to be told that the process lives on: a merge or a training may keep it for long."""
PATIENCE_S = 20.0
"""How long links that leave wait for a broker that says nothing."""
WINDOW = 0xFFFF
"""Messages that the broker may have on their way to a link: how much that is, its owner decides."""


class Loop:
    """Wait for many sockets at once; `pump` deals with what is ready."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._writing: deque[LoopLink] = deque()
        """Links that have something to write and are not known to be unable to."""
        self.published = 0
        """Messages that its links have handed to the broker, and wills: these from the moment at
        which a connection ends."""
        self.patience_s = PATIENCE_S
        """How long a link that leaves waits for a broker that says nothing."""
        self.broken = ""
        """Why the broker can't be relied on any more; empty while it can."""

    def give_up(self, why: str) -> None:
        """Rely on the broker no more: whoever leaves waits for nothing, and `pump` says why."""
        self.broken = self.broken or why
        self.patience_s = 0.0

    def watch(self, file: Any, ready: Callable[[], object]) -> None:
        """Call `ready` whenever there is something to read from a file, say a process's output."""
        self._selector.register(file, selectors.EVENT_READ, ready)

    def forget(self, file: Any) -> None:
        """Watch a file no more."""
        self._selector.unregister(file)

    def pump(self, timeout_s: float = 0.0) -> int:
        """Write what there is, wait for something to read, deal with it; return how much it was.

        Raises:
            TransportError: the broker has ended a connection, or leaves one without an answer.
        """
        writes = len(self._writing)
        for _ in range(writes):
            self._writing.popleft()._write()
        ready = self._selector.select(0.0 if self._writing else timeout_s)
        for key, events in ready:
            if isinstance(key.data, LoopLink):
                if events & selectors.EVENT_WRITE:
                    key.data._write()
                if events & selectors.EVENT_READ:
                    key.data._read()
            else:
                key.data()
        if self.broken:
            raise TransportError(self.broken)
        return writes + len(ready)

    def pump_until(self, happened: Callable[[], bool], quiet_s: float) -> bool:
        """Pump until something has happened; False where for so long nothing came at all."""
        last = time.monotonic()
        while not happened():
            if self.pump(0.02):
                last = time.monotonic()
            elif time.monotonic() - last > quiet_s:
                return False
        return True

    def close(self) -> None:
        self._selector.close()


class LoopLink:
    """A device's link to the broker, with a persistent session, on a loop (`DeviceLink`)."""

    def __init__(
        self,
        loop: Loop,
        address: BrokerAddress,
        client_id: str,
        *,
        will: tuple[str, bytes],
        on_message: Callable[[Incoming], None],
    ) -> None:
        self.loop, self.address, self.client_id = loop, address, client_id
        self._version = VERSIONS[address.version or "5"]
        self._will, self._on_message_here = will, on_message
        self._subscriptions = Subscriptions()
        self._client: paho.Client | None = None
        self._sock: Any = None
        self._registered_write = False
        self._announcement: tuple[str, bytes] | None = None
        self.connection = 0
        self.connected = False
        self.limits = BrokerLimits()
        self.failure = ""
        """Why the broker would not take something, the last time that it would not."""
        self.unanswered = 0
        """CONNECTs, SUBSCRIBEs and PUBLISHes on this connection that have no answer yet."""
        self.bytes_sent = self.bytes_received = 0

    def connect(self) -> None:
        """Reach the broker and ask to be let in; `connected` says when it has.

        Raises:
            TransportError: nobody is there.
        """
        client = new_client(
            self._version, self.client_id, temporary=False, context=None, will=self._will
        )
        client.on_socket_open, client.on_socket_close = self._opened, self._closed
        client.on_socket_register_write = self._wants_to_write
        client.on_socket_unregister_write = self._need_not_write
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_message = self._on_message
        client.on_publish, client.on_subscribe = self._on_publish, self._on_subscribe
        self._client, self.unanswered, self.failure = client, 1, ""
        knock(
            client,
            self.address,
            self._version,
            temporary=False,
            keepalive_s=KEEPALIVE_S,
            window=WINDOW,
        )

    @property
    def is_connecting(self) -> bool:
        """Whether the broker has been asked to let this in, and has not answered."""
        return self.unanswered > 0 and not self.connected

    def lose(self) -> None:
        """Lose the connection without a word, as a device out of reach does: the will is said.

        What was handed over before has reached the broker, and what it was told is dealt with does
        not come again, unless it is silent for long.
        """
        self._hear_out()
        self.loop.published += self.connected  # the will
        self._give_up()

    def close(self) -> None:
        """Leave the broker in good order: it says no will, and on MQTT 5 keeps no session."""
        self._hear_out()
        client, sock = self._client, self._sock
        if client is not None and isinstance(sock, socket.socket):
            client.on_disconnect = None
            last = None
            if self._version == paho.MQTTv5:
                last = Properties(PacketTypes.DISCONNECT)
                last.SessionExpiryInterval = 0
            with sock.dup() as still_open:  # paho closes it behind its last word
                client.disconnect(properties=last)
                client.loop_write()
                self._end(still_open)
        self._give_up()

    def _hear_out(self) -> None:
        """Wait, on this link alone, for the broker's answers to what has been handed over.

        Messages that come meanwhile are dealt with. Where it says nothing for too long it is given
        up, and `failure` says so.
        """
        last = time.monotonic()
        while self.unanswered > 0 and self._sock is not None and self._client is not None:
            self._client.loop_write()
            if self._sock is not None and _is_ready(self._sock, 0.02, self._client.want_write()):
                last = time.monotonic()
                self._read()
            elif time.monotonic() - last > self.loop.patience_s:
                self.failure = f"the broker has left {self.unanswered} messages unanswered"
                self.loop.give_up(f"{self.client_id}: {self.failure}")
                return
        if self._client is not None:
            self._client.loop_write()  # what has no answer
        while self._sock is not None and _is_ready(self._sock, 0.0):  # an end, perhaps
            self._read()

    def _give_up(self) -> None:
        """Let go of the connection, whatever stands."""
        client, self._client, self.connected = self._client, None, False
        self.unanswered = 0
        if client is not None:
            client.on_disconnect = None
        sock = self._sock
        self._closed()
        if isinstance(sock, socket.socket):
            self._end(sock)
            sock.close()

    def _end(self, sock: socket.socket) -> None:
        """Say that nothing more comes, and wait until the broker has read all and closes.

        One that meets a closed socket while it writes would leave unread what it has not read yet.
        """
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while _is_ready(sock, self.loop.patience_s):
                if not sock.recv(1 << 16):
                    return
            self.loop.give_up(f"{self.client_id}: the broker does not end the connection")

    # -- what a device does --------------------------------------------------------------------

    def subscribe(self, filters: list[str]) -> None:
        """Subscribe, now and on every later connection."""
        new = self._subscriptions.add(filters)
        if new and self.connected and self._client is not None:
            self._subscriptions.send(self._client, new)
            self.unanswered += 1

    def show_again(self, filters: list[str]) -> None:
        """Have the broker send once more what it retains under filters that are subscribed to."""
        if self.connected and self._client is not None:
            self._subscriptions.send(self._client, filters)
            self.unanswered += 1

    def unsubscribe(self, filters: list[str]) -> None:
        self._subscriptions.drop(filters)
        if filters and self.connected and self._client is not None:
            self._client.unsubscribe(filters)

    def announce(self, topic: str, payload: bytes) -> None:
        """Publish a retained message, now and on every later connection, until the next one."""
        self.remember(topic, payload)
        if self.connected:
            self.publish(topic, payload, retain=True)

    def remember(self, topic: str, payload: bytes) -> None:
        """Announce a message on later connections, not on this one."""
        self._announcement = topic, payload

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Delivery:
        """Hand a message to the broker; what it says comes later. Lost without a connection."""
        if (too_large := self.limits.refusal(topic, payload)) is not None:
            return too_large
        if self.connected and self._client is not None:
            self._client.publish(topic, payload, qos=QOS, retain=retain)
            self.bytes_sent += len(payload)
            self.loop.published += 1
            self.unanswered += 1
        return Delivery(topic)

    def publish_all(
        self, messages: Iterable[tuple[str, bytes]], *, retain: bool = False
    ) -> list[Delivery]:
        return [self.publish(topic, payload, retain=retain) for topic, payload in messages]

    def ack(self, incoming: Incoming) -> None:
        """Tell the broker that a message is dealt with; others come again on reconnection."""
        if not incoming.message_id:  # QoS 0, as amqtt sends wills: nobody waits for an answer
            return
        if incoming.connection == self.connection and self.connected and self._client is not None:
            self._client.ack(incoming.message_id, QOS)

    # -- sockets -------------------------------------------------------------------------------

    def _opened(self, _: paho.Client, __: Any, sock: Any) -> None:
        self._sock = sock
        self._registered_write = False
        self.loop._selector.register(sock, selectors.EVENT_READ, self)

    def _closed(self, *_: Any) -> None:
        if self._sock is not None:
            with suppress(KeyError, ValueError):
                self.loop._selector.unregister(self._sock)
            self._sock = None

    def _wants_to_write(self, *_: Any) -> None:
        self.loop._writing.append(self)

    def _need_not_write(self, *_: Any) -> None:
        """Do nothing: `_write` looks itself."""

    def _write(self) -> None:
        client = self._client
        if client is None or self._sock is None:
            return
        client.loop_write()
        more = client.want_write() and self._sock is not None
        if more != self._registered_write and self._sock is not None:
            self._registered_write = more
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if more else 0)
            self.loop._selector.modify(self._sock, events, self)

    def _read(self) -> None:
        if self._client is not None:
            self._client.loop_read()

    # -- what the broker says ------------------------------------------------------------------

    def _on_connect(
        self, client: paho.Client, _: Any, __: Any, code: ReasonCode, properties: Any
    ) -> None:
        self.unanswered -= 1
        if code.is_failure:
            self.failure = in_words(code)
            return
        self.connection += 1
        self.connected = True
        self.limits = BrokerLimits(properties)
        if self._subscriptions.filters:
            self._subscriptions.renew(client)
            self.unanswered += 1
        if self._announcement is not None:
            self.publish(*self._announcement, retain=True)

    def _on_disconnect(
        self, client: paho.Client, _: Any, __: Any, code: ReasonCode, ___: Any
    ) -> None:
        refused = "" if self.connected else self.failure
        self.loop.published += self.connected  # the will
        self.connected, self.unanswered = False, 0
        self.failure = f"the broker has ended the connection: {refused or in_words(code)}"
        self.loop.give_up(f"{self.client_id}: {self.failure}; look at the broker's log and limits")

    def _on_message(self, client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        if self._subscriptions.unasked(message):
            client.ack(message.mid, message.qos)
            return
        payload = bytes(message.payload)
        self.bytes_received += len(payload)
        self._on_message_here(
            Incoming(message.topic, payload, message.retain, message.mid, self.connection)
        )

    def _on_publish(self, _: Any, __: Any, ___: int, code: ReasonCode, ____: Any) -> None:
        self.unanswered -= 1
        if code.is_failure:
            self.failure = in_words(code)

    def _on_subscribe(
        self, _: Any, __: Any, message_id: int, codes: list[ReasonCode], ___: Any
    ) -> None:
        self.unanswered -= 1
        for code in codes:
            if code.is_failure:
                self.failure = in_words(code)


def _is_ready(sock: Any, wait_s: float, for_writing: bool = False) -> bool:
    """Say whether there is something to read, or an end, or room to write, waiting for it."""
    with selectors.DefaultSelector() as selector:
        write = selectors.EVENT_WRITE if for_writing else 0
        selector.register(sock, selectors.EVENT_READ | write)
        return bool(selector.select(wait_s))
