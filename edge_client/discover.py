"""Which job to take part in, when the owner has named none: the first that the broker shows."""

from __future__ import annotations

from collections.abc import Callable

from edge_client.config import Settings
from protocol import topics
from protocol.transport import MqttTransport

TICK_S = 0.5


def discover_job(settings: Settings, stopping: Callable[[], bool]) -> str:
    """Return the name of the first job shown, or "" when stopped before.

    A connection of its own asks: a device's last will names its job, and is said on connecting.

    Raises:
        TransportError: the broker can't be reached.
    """
    scout = MqttTransport(settings.broker, f"tunefleet-{settings.name}-scout")
    scout.connect()
    try:
        scout.subscribe([topics.subscription("job")])
        while not stopping():
            if (incoming := scout.receive(TICK_S)) is not None:
                scout.ack(incoming)
                return topics.match(incoming.topic).fields["job"]
        return ""
    finally:
        scout.close()
