"""Make a broker of one's own forget the replay before: every replay's job has the same name.

That name is part of the draws of directions and cohort, so that equal seeds give equal runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from device_profiles.errors import ReplayError
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import Status
from protocol.signing import open_message
from protocol.transport import BrokerAddress, Incoming, MqttTransport

QUIET_S = 0.5
"""A broker that has said nothing for this long has shown all that it kept."""


def clear_job(broker: str, job: str, devices: Sequence[str]) -> None:
    """Clear a job's retained messages and its clients' sessions from a broker.

    Raises:
        TransportError: the broker can't be reached, or refuses.
        ReplayError: a device of the job is online: another replay uses the broker.
    """
    address = BrokerAddress.parse(broker)
    link = MqttTransport(address, f"tunefleet-clear-{os.getpid()}", temporary=True)
    link.connect()
    try:
        link.subscribe([f"{topics.ROOT.format(job=job)}/#"])
        kept: list[str] = []
        while (incoming := link.receive(QUIET_S)) is not None:
            link.ack(incoming)
            if incoming.retained and incoming.payload:
                _check_offline(incoming, broker)
                kept.append(incoming.topic)
        for delivery in link.publish_all([(topic, b"") for topic in kept], retain=True):
            delivery.check()
    finally:
        link.close()
    for client in [f"aggregator-{job}", *devices]:
        session = MqttTransport(address, f"tunefleet-{client}", temporary=True)
        session.connect()
        session.close()


def _check_offline(incoming: Incoming, broker: str) -> None:
    try:
        if topics.match(incoming.topic).kind != "status":
            return
        status, _ = open_message(incoming.payload, incoming.topic, Status)
    except ProtocolError:
        return
    if status.online:
        raise ReplayError(
            f"another replay is running on {broker} (its device {status.device!r} is online); "
            "wait for its end, or name another broker with --broker"
        )
