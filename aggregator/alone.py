"""Before a job is served: whether the broker has it from somebody else already."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from aggregator.errors import StoreError
from aggregator.rounds import RoundState
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import Job, Round
from protocol.signing import open_message
from protocol.transport import BrokerAddress, Incoming, MqttTransport

PATIENCE_S = 10.0
"""How long a broker that keeps the echo back may take to show a job that it has."""


def at_once(link: MqttTransport) -> bool:
    """Connect, or fail."""
    link.connect()
    return True


def check_alone(
    broker: BrokerAddress,
    job: str,
    key: str,
    now: RoundState,
    connect: Callable[[MqttTransport], bool] = at_once,
) -> None:
    """Refuse a job that the broker has from somebody else: devices would hear only that one.

    `key` is the public key that is to sign the job, `now` where its state stands; `connect`
    returns False when it was stopped before there was a connection.

    Raises:
        StoreError: another key has signed it, or the same one has gone on further.
        TransportError: the broker can't be reached, or refuses the subscription.
    """
    job_topic, round_topic = topics.topic("job", job=job), topics.topic("round", job=job)
    for incoming in _kept(broker, job, [job_topic, round_topic], connect):
        model = Job if incoming.topic == job_topic else Round
        try:
            message, signer = open_message(incoming.payload, incoming.topic, model)
        except ProtocolError:
            continue
        if signer != key:
            raise StoreError(
                f"the broker has a job {job!r} from another aggregator, or from this one with "
                "another --state or --key: go on with those, or take another job name"
            )
        here = now.number, now.attempt
        if isinstance(message, Round) and (message.number, message.attempt) > here:
            raise StoreError(
                f"the broker has job {job!r} in round {message.number}, attempt {message.attempt}; "
                f"this state is in round {now.number}, attempt {now.attempt}, and devices never go "
                "back: go on with the --state folder that served it, or take another job name"
            )


def _kept(
    broker: BrokerAddress, job: str, names: list[str], connect: Callable[[MqttTransport], bool]
) -> list[Incoming]:
    """Return what a broker keeps on topics.

    It sends what it keeps when it takes the subscription. So a message to oneself that is sent
    after that, here on the control topic of a device that there is not, is the last to come back.
    """
    scout = MqttTransport(broker, f"tunefleet-aggregator-{job}-scout", temporary=True)
    echo = topics.topic("control", job=job, device=f"scout-{secrets.token_hex(8)}")
    found: list[Incoming] = []
    if not connect(scout):
        return found
    try:
        scout.subscribe([*names, echo])
        scout.publish(echo, b"")  # refused or not: without the echo the wait is longer, that's all
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            incoming = scout.receive(left)
            if incoming is None or incoming.topic == echo:
                break
            if incoming.payload:
                found.append(incoming)
    finally:
        scout.close()
    return found
