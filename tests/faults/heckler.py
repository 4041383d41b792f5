"""A stranger at a broker without access rules, who spoils what devices upload."""

from __future__ import annotations

import random
import threading

from protocol import topics
from protocol.transport import BrokerAddress, MqttTransport


class Heckler:
    """Overhear chunks and say them again: as they are, out of order, broken, cut, misnumbered.

    At most one bad chunk for two good ones: more would use up the quota of the device.
    """

    def __init__(self, broker: BrokerAddress, job: str, chance: random.Random) -> None:
        self._link = MqttTransport(broker, "heckler", temporary=True)
        self._filter = topics.subscription("upload_chunk", job=job)
        self._random = chance
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heckle, daemon=True)
        self.said = 0

    def __enter__(self) -> Heckler:
        self._link.connect()
        self._link.subscribe([self._filter])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._link.close()

    def _heckle(self) -> None:
        own: set[tuple[str, bytes]] = set()
        kept: list[tuple[str, bytes]] = []
        while not self._stop.is_set():
            heard = self._link.receive(0.2)
            if heard is None:
                continue
            self._link.ack(heard)
            if topics.match(heard.topic).kind != "upload_chunk":
                continue
            if (heard.topic, heard.payload) in own:
                own.discard((heard.topic, heard.payload))
                continue
            kept = [*kept[-5:], (heard.topic, heard.payload)]
            if self._random.random() < 0.5:
                spoilt = self._spoil(kept)
                own.add(spoilt)
                self._link.publish(*spoilt)
                self.said += 1

    def _spoil(self, kept: list[tuple[str, bytes]]) -> tuple[str, bytes]:
        topic, payload = self._random.choice(kept)
        upload, _, index = topic.rpartition("/")
        how = self._random.choice(("again", "other", "broken", "cut", "misnumbered", "unknown"))
        if how == "other":  # the bytes of one chunk under the number of another
            return topic, self._random.choice(kept)[1]
        if how == "broken":
            at = self._random.randrange(len(payload))
            return topic, payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        if how == "cut":
            return topic, payload[: self._random.randrange(len(payload))]
        if how == "misnumbered":
            return f"{upload}/{(int(index) + 1) % 4}", payload
        if how == "unknown":
            return f"{upload}/4000", payload
        return topic, payload
