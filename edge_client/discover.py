"""Before taking part: which job there is, whether the device's name is free in it, the link."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from edge_client.config import Settings
from edge_client.errors import NameTaken
from edge_client.standing import Standing
from protocol import topics
from protocol.errors import ProtocolError
from protocol.messages import Round, Status
from protocol.patience import Waiting, connect_when_up
from protocol.signing import open_message
from protocol.transport import Incoming, MqttTransport

TICK_S = 0.5
"""A broker that has said nothing for this long has shown what it keeps."""


def discover_job(
    settings: Settings, public_key: str, stopping: Callable[[], bool], waiting: Waiting
) -> str:
    """Return the owner's job, or else the first that is not finished; "" when stopped before.

    A connection of its own asks: a device's last will names its job, and is said on connecting.
    A broker that takes the client id from the certificate gives it the device's own session, which
    is to outlive it: what waits there for the agent is left unacknowledged, and comes again. The
    name in a certificate is the device's own, so that nobody has to ask whether it is free.

    Raises:
        TransportError: the broker can't be reached, and waiting is no use or not wanted.
        NameTaken: another device takes part in the job by this name.
    """
    if settings.tls is not None and settings.job:
        return settings.job
    scout = MqttTransport(
        settings.broker,
        f"tunefleet-{settings.name}-scout",
        tls=settings.tls,
        temporary=settings.tls is None,
    )
    if not connect_when_up(scout, waiting, stopping=stopping, wait=settings.wait_for_broker):
        return ""
    try:
        job = settings.job or _first_job(scout, stopping, waiting)
        if job and settings.tls is None:
            _check_name(scout, job, settings.name, public_key)
        return job
    finally:
        scout.close()


def link_of(settings: Settings, will: tuple[str, bytes], waiting: Waiting) -> MqttTransport:
    """Return a device's own link for a job, not connected yet."""
    return MqttTransport(
        settings.broker,
        f"tunefleet-{settings.name}",
        will=will,
        tls=settings.tls,
        on_outage=lambda why: waiting.say(f"the broker at {settings.broker}", why),
    )


def enter_job(
    settings: Settings,
    job: str,
    link: MqttTransport,
    standing: Standing,
    stopping: Callable[[], bool],
    waiting: Waiting,
) -> None:
    """Connect, say that this device is here, and listen; without effect when stopped before.

    Raises:
        TransportError: the broker can't be reached, and waiting is no use or not wanted.
    """
    if not connect_when_up(link, waiting, stopping=stopping, wait=settings.wait_for_broker):
        return
    standing.claim(link)
    link.subscribe(
        [
            topics.subscription("job", job=job),
            topics.subscription("round", job=job),
            topics.subscription("control", job=job, device=settings.name),
        ]
    )


def _first_job(scout: MqttTransport, stopping: Callable[[], bool], waiting: Waiting) -> str:
    """Wait until a job is shown that is not known to be finished."""
    states: dict[str, str] = {}
    filters = [topics.subscription("job"), topics.subscription("round")]
    scout.subscribe(filters)
    while not stopping():
        if (incoming := scout.receive(TICK_S)) is not None:
            with suppress(ProtocolError):
                _note(scout, incoming, states)
        # One whose round is not known may be finished: that shows once the broker is quiet.
        good = ("open", "waiting") if incoming is not None else ("open", "waiting", "")
        if job := next((job for job, state in states.items() if state in good), ""):
            scout.unsubscribe(filters)
            return job
        if states and incoming is None:
            waiting.say("another job", f"finished: {', '.join(sorted(states))}")
    return ""


def _note(scout: MqttTransport, incoming: Incoming, states: dict[str, str]) -> None:
    """Note the job that a message shows, and its state if it says that: job → state, or empty.

    What waits in a session is of a job too, and may be in the way of what the broker would show.
    """
    found = topics.match(incoming.topic)
    job = found.fields["job"]
    if found.kind in ("job", "round"):
        scout.ack(incoming)
    if found.kind == "job" and not incoming.payload:
        states.pop(job, None)
    elif incoming.payload:
        states.setdefault(job, "")
        if found.kind == "round":
            states[job] = open_message(incoming.payload, incoming.topic, Round)[0].state


def _check_name(scout: MqttTransport, job: str, device: str, public_key: str) -> None:
    """Refuse a name that the aggregator knows with another key: it would hear nobody else by it.

    Raises:
        NameTaken: it does; two who connect by one name also push each other off the broker.
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
            raise NameTaken(device, job)
        return
