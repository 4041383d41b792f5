"""A virtual device's link: real messages over a real broker, which take the trace's time.

Bytes go through the broker at once. What comes in reaches the agent, and what goes out reaches the
broker, when the link as the trace has it would have carried it: one message after the other, each
way by itself, at the rate of the moment at which it begins. A message is acknowledged when it has
reached the agent, so one that is lost with the connection comes again from the broker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from device_profiles.virtual.schedule import Schedule
from protocol.link import BrokerAddress, Delivery, Incoming
from protocol.loop_link import Loop, LoopLink

LEAST_BITS_S = 1000.0
"""A link that carries nothing is waited for at this rate, until the trace has it offline."""


class Rates(NamedTuple):
    """What a link carries, in bits a second."""

    down: float
    up: float


class VirtualLink:
    """Be a device's link (`DeviceLink`) in virtual time; `deliver` gets what has arrived."""

    def __init__(
        self,
        loop: Loop,
        address: BrokerAddress,
        client_id: str,
        will: tuple[str, bytes],
        *,
        schedule: Schedule,
        device: int,
        now: Callable[[], float],
        rates: Callable[[float], Rates],
        deliver: Callable[[Incoming, float], None],
    ) -> None:
        self._link = LoopLink(loop, address, client_id, will=will, on_message=self._on_message)
        self._schedule, self._device = schedule, device
        self._now, self._rates, self._deliver = now, rates, deliver
        self._status_topic = will[0]
        self._announced = b""
        self._echo = b""
        """A status of ours that the broker has not shown us yet; all it sent before comes first."""
        self._down_free = self._up_free = 0.0
        self._on_its_way = 0
        """Parts of adapters that have come and not reached the agent."""
        self.told = 0
        """Controls that have come, on whatever connection."""
        self._untaken = 0
        """Those of them that the agent has not got."""
        self.last_round = b""
        self.bytes_received = 0
        """Payload bytes that have reached the agent."""

    # -- the connection ------------------------------------------------------------------------

    def connect(self) -> None:
        """Come into reach of the broker.

        Raises:
            TransportError: it is not there.
        """
        self._echo = self._announced
        self._link.connect()

    def lose(self) -> None:
        """Get out of reach; what is on its way is lost."""
        self._link.lose()
        self._down_free = self._up_free = 0.0
        self._on_its_way, self._echo = 0, b""
        self.told -= self._untaken  # the broker sends these again
        self._untaken = 0
        self.last_round = b""

    def close(self) -> None:
        self._link.close()

    @property
    def connected(self) -> bool:
        return self._link.connected

    @property
    def is_connecting(self) -> bool:
        return self._link.is_connecting

    @property
    def connection(self) -> int:
        return self._link.connection

    @property
    def bytes_sent(self) -> int:
        return self._link.bytes_sent

    @property
    def failure(self) -> str:
        """Why the broker would not take something; empty where it has taken all."""
        return self._link.failure

    @property
    def idle_s(self) -> float:
        """When all that is to be sent will have left."""
        return max(self._now(), self._up_free)

    def is_settled(self, outstanding: int) -> bool:
        """Say whether nothing real is under way; `outstanding` parts of an adapter are to come."""
        link = self._link
        return link.unanswered == 0 and not self._echo and self._on_its_way >= outstanding

    def lacks(self, outstanding: int) -> str:
        """Say in words what `is_settled` waits for."""
        return (
            f"{self._link.unanswered} answers, {max(0, outstanding - self._on_its_way)} chunks"
            f"{', an echo of its status' if self._echo else ''}"
            f"{', ' + self.failure if self.failure else ''}"
        )

    # -- what an agent does --------------------------------------------------------------------

    def subscribe(self, filters: list[str]) -> None:
        self._link.subscribe(filters)

    def show_again(self, filters: list[str]) -> None:
        self._link.show_again(filters)

    def unsubscribe(self, filters: list[str]) -> None:
        self._link.unsubscribe(filters)

    def announce(self, topic: str, payload: bytes) -> None:
        """Publish a status; one that says nothing new is not said again."""
        if payload == self._announced:
            return
        self._announced = payload
        self._link.remember(topic, payload)
        self.publish(topic, payload, retain=True)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Delivery:
        """Send a message; it has left when the link has carried it. Lost without a connection."""
        if not self.connected:
            return Delivery(topic)
        if (too_large := self._link.limits.refusal(topic, payload)) is not None:
            return too_large
        begins = max(self._now(), self._up_free)
        self._up_free = begins + 8 * len(payload) / max(self._rates(begins).up, LEAST_BITS_S)
        connection = self.connection

        def leave(_: float) -> None:
            if self.connected and self.connection == connection:
                if topic == self._status_topic:
                    self._echo = payload
                self._link.publish(topic, payload, retain=retain)

        self._schedule.at(self._up_free, self._device, leave)
        return Delivery(topic)

    def publish_all(
        self, messages: Iterable[tuple[str, bytes]], *, retain: bool = False
    ) -> list[Delivery]:
        return [self.publish(topic, payload, retain=retain) for topic, payload in messages]

    # -- what comes ----------------------------------------------------------------------------

    def _on_message(self, incoming: Incoming) -> None:
        """Note a message that has really come; it reaches the agent in virtual time."""
        topic = incoming.topic
        is_part, is_told = "/global/" in topic, topic.endswith("/ctl")
        if topic == self._status_topic and incoming.payload == self._echo:
            self._echo = b""
        elif topic.endswith("/round"):
            self.last_round = incoming.payload
        self._on_its_way += is_part
        self.told += is_told
        self._untaken += is_told
        begins = max(self._now(), self._schedule.floor, self._down_free)
        size = 8 * len(incoming.payload)
        self._down_free = begins + size / max(self._rates(begins).down, LEAST_BITS_S)

        def arrive(time_s: float) -> None:
            if incoming.connection != self.connection or not self.connected:
                return
            self.bytes_received += len(incoming.payload)
            self._on_its_way -= is_part
            self._untaken -= is_told
            self._link.ack(incoming)
            self._deliver(incoming, time_s)

        self._schedule.at(self._down_free, self._device, arrive)
