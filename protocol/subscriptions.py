"""What is subscribed to, now and after every reconnection, and what the broker says to it."""

from __future__ import annotations

from collections.abc import Iterable

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from protocol.connecting import QOS
from protocol.errors import DeliveryRefused
from protocol.link import in_words


class Subscriptions:
    """Hold topic filters, and the answers to SUBSCRIBEs by message id.

    `unasked`, `renew` and `hear` are called on the network's thread.
    """

    def __init__(self) -> None:
        self._filters: dict[str, bool] = {}
        """Filters → whether what matches is to come as it was published."""
        self._answers: dict[int, str] = {}
        """Answered SUBSCRIBEs → why the broker refuses, or empty."""
        self._renewal: int | None = None
        self._renewed = 0
        """The last connection on which everything has been subscribed to again."""

    @property
    def filters(self) -> list[str]:
        """All that is subscribed to."""
        return list(self._filters)

    def add(self, filters: Iterable[str], *, as_published: bool = False) -> list[str]:
        """Remember filters; return those that are new."""
        new = [f for f in filters if f not in self._filters]
        self._filters.update(dict.fromkeys(new, as_published))
        return new

    def drop(self, filters: Iterable[str]) -> None:
        """Forget filters."""
        self._filters = {f: how for f, how in self._filters.items() if f not in filters}

    def unasked(self, message: paho.MQTTMessage) -> bool:
        """Say whether a retained message matches no filter: amqtt shows a new session all of them.

        What is not retained may have waited in our session since before a restart: it is asked for.
        """
        return message.retain and not any(
            paho.topic_matches_sub(f, message.topic) for f in tuple(self._filters)
        )

    def renew(self, client: paho.Client) -> None:
        """Subscribe to everything on a new connection."""
        if self._filters:
            self._renewal = self.send(client, list(self._filters))

    def send(self, client: paho.Client, filters: list[str]) -> int | None:
        """Send a SUBSCRIBE of filters that are remembered; return its message id."""
        if client._protocol != paho.MQTTv5:
            return client.subscribe([(f, QOS) for f in filters])[1]
        return client.subscribe([(f, _options(self._filters.get(f, False))) for f in filters])[1]

    def hear(self, message_id: int, codes: list[ReasonCode], connection: int) -> None:
        """Note an answer that came on the connection of this number."""
        self._answers[message_id] = next((in_words(c) for c in codes if c.is_failure), "")
        if message_id == self._renewal:
            self._renewed = connection

    def answered(self, message_id: int | None, connection: int) -> bool:
        """Say whether a SUBSCRIBE has been answered, on its connection or by a later one's."""
        return message_id in self._answers or self._renewed > connection

    def check(self, message_id: int | None, filters: list[str]) -> None:
        """Look at the answer to a SUBSCRIBE of these filters.

        Raises:
            DeliveryRefused: the broker refuses one of them.
        """
        if why := self._answers.get(message_id or 0):
            raise DeliveryRefused(", ".join(filters), why)


def _options(as_published: bool) -> SubscribeOptions:
    return SubscribeOptions(QOS, noLocal=as_published, retainAsPublished=as_published)
