"""What a device needs of its broker: that it is there, and what it lets this device do."""

from __future__ import annotations

import time

from edge_client.doctor import Check, Patient
from edge_client.errors import StorageError
from edge_client.report import agent_runs
from edge_client.saying import saying
from protocol import topics
from protocol.chunks import CHUNK_BYTES
from protocol.errors import BrokerUnreachable, DeliveryRefused, TransportError
from protocol.transport import MqttTransport

JOB = "doctor"
"""A job that there is not: nobody hears what is said of it."""
NOBODY = "doctor-nobody"
"""A device that there is not."""
ENVELOPE_BYTES = 512 * 1024
"""No signed message is larger."""
TIMEOUT_S = 10.0
ANSWER_S = 12.0
"""How long a broker has to let this device in, all attempts together."""
SILENT_S = 2.0
"""After so long a wait it is said what for."""


def checks_at_broker(patient: Patient) -> list[Check]:
    """Log in as the device does, and try what it may.

    A broker that takes the name from the certificate knows one connection of it: while the agent
    runs nothing is tried, for that would put it off.
    """
    if patient.bad_membership:
        return [Check("broker", "warn", "not tried: who this device is there is not known")]
    try:
        if patient.tls is not None and agent_runs(patient.state):
            said = "not tried while the agent runs: see edge-client status"
            return [Check("broker", "ok", said)]
        link = MqttTransport(
            patient.broker,
            f"tunefleet-{patient.name}-doctor",
            tls=patient.tls,
            temporary=patient.tls is None,
        )
        until = time.monotonic() + ANSWER_S
        what = f"waiting for an answer of {patient.broker}, {ANSWER_S:.0f} s at most"
        with saying(what, after_s=SILENT_S):
            link.connect(TIMEOUT_S, stopping=lambda: time.monotonic() > until)
    except BrokerUnreachable as error:
        silent = "no answer" in error.why
        remedy = "something is there, but does not speak MQTT, or is busy" if silent else ""
        return [Check("broker", "fail", str(error), remedy)]
    except (TransportError, StorageError) as error:
        return [Check("broker", "fail", str(error))]
    try:
        version = "MQTT 5" if link.mqtt5 else "MQTT 3.1.1"
        there = Check("broker", "ok", f"{patient.broker} lets this device in, with {version}")
        return [there, rights(link, patient), limits(link)]
    except TransportError as error:
        return [Check("broker", "fail", str(error), "look at the broker's log")]
    finally:
        link.close()


def rights(link: MqttTransport, patient: Patient) -> Check:
    """Try whether the device may use its own topics, and whether nobody else's."""
    own = topics.subscription("control", job=JOB, device=patient.name)
    try:
        link.subscribe([own])
        link.unsubscribe([own])
        if not link.mqtt5:
            return Check("rights", "ok", "not known: with MQTT 3.1.1 a broker does not say")
        link.publish(_topic(patient.name), b"", timeout_s=TIMEOUT_S).check()
    except DeliveryRefused as error:
        remedy = "the operator's access rules have to let it use the topics of its own name"
        return Check("rights", "fail", str(error), remedy)
    if link.publish(_topic(NOBODY), b"", timeout_s=TIMEOUT_S).refused:
        return Check("rights", "ok", "its own topics, and no others'")
    if patient.tls is None:
        remedy = "for trial alone; for a fleet make one with `aggregator init`"
        return Check("rights", "warn", "everybody may write on everybody's topics", remedy)
    remedy = "the operator's broker does not go by the fleet's acl file"
    return Check("rights", "fail", "this device may write on others' topics", remedy)


def limits(link: MqttTransport) -> Check:
    """See whether chunks and messages are not too large for the broker."""
    limit = link.limits.packet_bytes
    if limit is None:
        return Check("limits", "ok", "the broker names no largest packet")
    found = f"packets of {limit} bytes at most, {link.limits.window} at once"
    remedy = f"the operator sets max_packet_size to {2 * ENVELOPE_BYTES} or more"
    if limit < CHUNK_BYTES + 1024:
        return Check("limits", "fail", f"{found}: too small for a chunk", remedy)
    if limit < ENVELOPE_BYTES:
        return Check("limits", "warn", f"{found}: messages of large jobs are larger", remedy)
    return Check("limits", "ok", found)


def _topic(device: str) -> str:
    return topics.topic("upload_chunk", job=JOB, device=device, upload="0" * 32, index=0)
