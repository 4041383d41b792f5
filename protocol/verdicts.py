"""What the broker has said to what was published: waited for, or looked at later."""

from __future__ import annotations

from paho.mqtt.reasoncodes import ReasonCode

from protocol.link import Delivery, in_words


class Verdicts:
    """Hold the broker's answers by message id. `hear` is called on the network's thread."""

    def __init__(self) -> None:
        self._heard: dict[int, ReasonCode] = {}
        self._watched: dict[int, str] = {}
        self._unsent: list[Delivery] = []

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._heard

    @property
    def awaited(self) -> int:
        """How many of the watched messages are not answered yet, or not looked at."""
        return len(self._watched)

    def hear(self, message_id: int, code: ReasonCode) -> None:
        """Note an answer."""
        self._heard[message_id] = code

    def take(self, topic: str, message_id: int) -> Delivery:
        """Return the answer to a message, which is there."""
        code = self._heard.pop(message_id)
        return Delivery(topic, in_words(code) if code.is_failure else "")

    def watch(self, topic: str, sent: int | Delivery) -> None:
        """Look at a message's answer later: by its id, or what kept it from being sent."""
        if isinstance(sent, Delivery):
            self._unsent.append(sent)
        else:
            self._watched[sent] = topic

    def refused(self) -> list[Delivery]:
        """Return the watched messages that have been refused since this was last asked."""
        found, self._unsent = self._unsent, []
        for message_id in [m for m in self._watched if m in self._heard]:
            delivery = self.take(self._watched.pop(message_id), message_id)
            if delivery.refused:
                found.append(delivery)
        return found
