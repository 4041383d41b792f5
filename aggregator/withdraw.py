"""Take a job off a broker: what is retained of it would call devices into it for ever."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from aggregator.artifacts import topics_of
from aggregator.errors import ConfigError, JobInUse
from aggregator.kept import kept_messages
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import ArtifactManifest, Status
from protocol.signing import open_message
from protocol.transport import BrokerAddress, Incoming, MqttTransport, TlsFiles

ALL_BUT_CHUNKS = ("+", "global/#", "candidate/#", "d/#", "onnx/manifest")
"""Below a job: all but the chunks of an artifact set, which may be hundreds of MiB."""


class Withdrawn(NamedTuple):
    """Count the messages of a job that a broker has let go, and those that it has not."""

    cleared: int
    left: int
    """Statuses of devices, where access rules let nobody else write them; they call nobody."""


def withdraw(
    broker: BrokerAddress,
    job: str,
    *,
    tls: TlsFiles | None = None,
    devices: Sequence[str] = (),
    force: bool = False,
) -> Withdrawn:
    """Clear all that a broker retains of a job, and the session of its aggregator.

    The sessions of `devices` are cleared too. An aggregator that still serves the job would put it
    back.

    Raises:
        ConfigError: that is no job's name.
        JobInUse: a device is online in it, and it is not forced.
        TransportError: the broker can't be reached, or refuses.
    """
    if not re.fullmatch(topics.NAME, job):
        raise ConfigError(f"{job!r} is not a job's name: small letters, digits and inner dashes")
    link = MqttTransport(broker, f"tunefleet-aggregator-{job}-withdraw", tls=tls, temporary=True)
    link.connect()
    try:
        kept: list[str] = []
        online: list[str] = []
        root = topics.ROOT.format(job=job)
        for incoming in kept_messages(link, job, [f"{root}/{one}" for one in ALL_BUT_CHUNKS]):
            kept.append(incoming.topic)
            kept += _artifact_chunks(incoming)
            online += _online_device(incoming)
        if online and not force:
            raise JobInUse(job, str(broker), sorted(online))
        left = _clear(link, kept)
        # What no manifest speaks of: chunks of a set that was never published whole, and the like.
        while strays := {m.topic for m in kept_messages(link, job, [f"{root}/#"])} - {*kept}:
            left += _clear(link, sorted(strays))
            kept += strays
            link.unsubscribe([f"{root}/#"])
    finally:
        link.close()
    for client in [f"aggregator-{job}", *devices]:
        session = MqttTransport(broker, f"tunefleet-{client}", tls=tls, temporary=True)
        session.connect()
        session.close()
    return Withdrawn(len(kept) - left, left)


def _clear(link: MqttTransport, kept: list[str]) -> int:
    """Clear topics; return how many statuses are left."""
    left = 0
    for delivery in link.publish_all([(topic, b"") for topic in kept], retain=True):
        if delivery.refused and _is_status(delivery.topic):
            left += 1
        else:
            delivery.check()
    return left


def _is_status(topic: str) -> bool:
    try:
        return topics.match(topic).kind == "status"
    except ProtocolError:
        return False


def _artifact_chunks(incoming: Incoming) -> list[str]:
    """Return the topics of an artifact set's chunks, if the message is its manifest."""
    if not incoming.topic.endswith("/onnx/manifest"):
        return []
    try:
        manifest, _ = open_message(incoming.payload, incoming.topic, ArtifactManifest)
    except ProtocolError:
        return []
    return topics_of(manifest)[1:]


def _online_device(incoming: Incoming) -> list[str]:
    """Return the device whose status says that it is online, if the message is one."""
    if not _is_status(incoming.topic):
        return []
    try:
        status, _ = open_message(incoming.payload, incoming.topic, Status)
    except ProtocolError:
        return []
    return [status.device] if status.online else []
