"""Before taking part: which job there is, and whether the device's name is free in it."""

from __future__ import annotations

from collections.abc import Callable

from edge_client.config import Settings
from edge_client.errors import ConfigError
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import Status
from protocol.signing import open_message
from protocol.transport import MqttTransport

TICK_S = 0.5


def discover_job(settings: Settings, public_key: str, stopping: Callable[[], bool]) -> str:
    """Return the owner's job, or else the first one shown; "" when stopped before.

    A connection of its own asks: a device's last will names its job, and is said on connecting.
    A broker that takes the client id from the certificate gives it the device's own session, which
    is to outlive it: what waits there for the agent is left unacknowledged, and comes again. The
    name in a certificate is the device's own, so that nobody has to ask whether it is free.

    Raises:
        TransportError: the broker can't be reached.
        ConfigError: another device takes part in the job by this name.
    """
    if settings.tls is not None and settings.job:
        return settings.job
    scout = MqttTransport(
        settings.broker,
        f"tunefleet-{settings.name}-scout",
        tls=settings.tls,
        temporary=settings.tls is None,
    )
    scout.connect()
    try:
        job = settings.job or _first_job(scout, stopping)
        if job and settings.tls is None:
            _check_name(scout, job, settings.name, public_key)
        return job
    finally:
        scout.close()


def _first_job(scout: MqttTransport, stopping: Callable[[], bool]) -> str:
    every_job = [topics.subscription("job")]
    scout.subscribe(every_job)
    while not stopping():
        if (incoming := scout.receive(TICK_S)) is not None:
            if (found := topics.match(incoming.topic)).kind == "job":
                scout.ack(incoming)
            scout.unsubscribe(every_job)
            return found.fields["job"]
    return ""


def _check_name(scout: MqttTransport, job: str, device: str, public_key: str) -> None:
    """Refuse a name that the aggregator knows with another key: it would hear nobody else by it.

    Two who connect by one name also push each other off the broker, for ever.
    """
    topic = topics.topic("status", job=job, device=device)
    scout.subscribe([topic])
    while (incoming := scout.receive(TICK_S)) is not None:
        scout.ack(incoming)
        if incoming.topic != topic or not incoming.payload:
            continue
        try:
            _, key = open_message(incoming.payload, topic, Status)
        except ProtocolError:
            continue
        if key != public_key:
            raise ConfigError(
                f"another device, or this one with another --state, takes part in job {job!r} as "
                f"{device!r}; choose another --name, or go on with that state"
            )
        return
