"""Before a job is served: whether the broker has it from somebody else already."""

from __future__ import annotations

from collections.abc import Callable

from aggregator.errors import StoreError
from aggregator.kept import kept_messages
from aggregator.rounds import RoundState
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import Job, Round
from protocol.signing import open_message
from protocol.transport import BrokerAddress, Incoming, MqttTransport


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
        StoreError: another key has signed it; or the same one has, while this state has never
            served or is not as far.
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
                "another --state or --key: go on with those, take another job name, or take it off "
                f"the broker: `aggregator withdraw {job}`"
            )
        if now.version == 0:  # a state that has served has committed a version before it said so
            raise StoreError(
                f"the broker has job {job!r} from another --state of this aggregator's: go on with "
                "that one, take another job name, or take it off the broker: "
                f"`aggregator withdraw {job}`"
            )
        here = now.number, now.attempt
        if isinstance(message, Round) and (message.number, message.attempt) > here:
            raise StoreError(
                f"the broker has job {job!r} in round {message.number}, attempt {message.attempt}; "
                f"this state is in round {now.number}, attempt {now.attempt}, and devices never go "
                "back: go on with the --state folder that served it, take another job name, or "
                f"take it off the broker: `aggregator withdraw {job}`"
            )


def _kept(
    broker: BrokerAddress, job: str, names: list[str], connect: Callable[[MqttTransport], bool]
) -> list[Incoming]:
    scout = MqttTransport(broker, f"tunefleet-aggregator-{job}-scout", temporary=True)
    if not connect(scout):
        return []
    try:
        return list(kept_messages(scout, job, names))
    finally:
        scout.close()
