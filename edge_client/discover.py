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
    A broker that takes the client id from the certificate gives it the device's own session: what
    waits there for the agent is left unacknowledged, and comes again.

    Raises:
        TransportError: the broker can't be reached.
    """
    scout = MqttTransport(settings.broker, f"tunefleet-{settings.name}-scout", tls=settings.tls)
    scout.connect()
    every_job = [topics.subscription("job")]
    try:
        scout.subscribe(every_job)
        while not stopping():
            if (incoming := scout.receive(TICK_S)) is not None:
                if (found := topics.match(incoming.topic)).kind == "job":
                    scout.ack(incoming)
                scout.unsubscribe(every_job)
                return found.fields["job"]
        return ""
    finally:
        scout.close()
