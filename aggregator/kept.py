"""What a broker keeps: the retained messages on topics."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from protocol import topics
from protocol.transport import Incoming, MqttTransport

PATIENCE_S = 10.0
"""How long a broker that keeps the echo back may take to show what it has."""


def kept_messages(link: MqttTransport, job: str, filters: list[str]) -> Iterator[Incoming]:
    """Yield what a broker keeps of a job below topic filters, on a connection of one's own.

    It sends what it keeps when it takes the subscription. So a message to oneself that is sent
    after that, here on the manifest of a version that there is not, is the last to come back.

    Raises:
        TransportError: the broker does not answer, or refuses the subscription.
    """
    nobodys = 10**8 + secrets.randbelow(9 * 10**8)
    echo = topics.topic("global_manifest", job=job, version=nobodys)
    link.subscribe(filters)
    link.subscribe([echo])
    link.publish(echo, b"")  # refused or not: without the echo the wait is longer, that's all
    deadline = time.monotonic() + PATIENCE_S
    while (left := deadline - time.monotonic()) > 0:
        incoming = link.receive(left)
        if incoming is None or incoming.topic == echo:
            break
        link.ack(incoming)
        if incoming.retained and incoming.payload:
            yield incoming
