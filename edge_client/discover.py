"""Before taking part: which job there is, whether the device's name is free in it, the link."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from edge_client.config import Settings
from edge_client.errors import ConfigError, NameTaken, OtherAggregator
from edge_client.shown import ShownJobs
from edge_client.standing import Standing
from edge_client.trust import FILE as TRUST_FILE
from edge_client.trust import trusted_key
from protocol import topics
from protocol.errors import ProtocolError
from protocol.link import DeviceLink
from protocol.messages import Status
from protocol.patience import Waiting, connect_when_up
from protocol.signing import open_message
from protocol.transport import MqttTransport

TICK_S = 0.5
"""A broker that has said nothing for this long has shown what it keeps."""
BUSY_S = 10.0
"""A broker that goes on talking for so long has shown it too."""


def discover_job(
    settings: Settings, public_key: str, stopping: Callable[[], bool], waiting: Waiting
) -> str:
    """Return the owner's job, or else the only one that is not finished; "" when stopped before.

    A connection of its own asks: a device's last will names its job, and is said on connecting.
    A broker that takes the client id from the certificate gives it the device's own session, which
    is to outlive it: what waits there for the agent is left unacknowledged, and comes again. The
    name in a certificate is the device's own, so that nobody has to ask whether it is free.

    Raises:
        TransportError: the broker can't be reached, and waiting is no use or not wanted.
        NameTaken: another device takes part in the job by this name.
        OtherAggregator: the owner's job is not of the aggregator that this device trusts.
        ConfigError: who does not wait names no job though there are several, or one not shown.
        StorageError: the key of the aggregator that this device trusts is damaged.
    """
    shown = ShownJobs(trusted_key(settings.state))
    if settings.tls is not None and settings.job and settings.wait_for_broker:
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
        filters = [topics.subscription("job"), topics.subscription("round")]
        scout.subscribe(filters)
        if settings.job:
            _look(scout, shown, stopping)
            _check_job(settings, shown)
            job = settings.job
        else:
            job = _only_job(scout, settings, shown, stopping, waiting)
        scout.unsubscribe(filters)
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
    listen(link, standing, job, settings.name)


def listen(link: DeviceLink, standing: Standing, job: str, device: str) -> None:
    """Say that a device is here, and listen to what a job says to all and to it.

    Raises:
        TransportError: the broker does not answer, or refuses it.
    """
    standing.claim(link)
    link.subscribe(
        [
            topics.subscription("job", job=job),
            topics.subscription("round", job=job),
            topics.subscription("control", job=job, device=device),
        ]
    )


def _look(scout: MqttTransport, shown: ShownJobs, stopping: Callable[[], bool]) -> None:
    """Take in all that the broker shows, until it is quiet, or too busy to be waited for.

    What waits in a session is left to the agent, and may be in the way of what is shown.
    """
    until = time.monotonic() + BUSY_S
    while not stopping() and (incoming := scout.receive(TICK_S)) is not None:
        shown.note(incoming)
        with suppress(ProtocolError):
            if topics.match(incoming.topic).kind in ("job", "round"):
                scout.ack(incoming)
        if time.monotonic() > until:
            return


def _check_job(settings: Settings, shown: ShownJobs) -> None:
    """Look at the owner's job, if it is shown.

    Raises:
        OtherAggregator: it is not of the aggregator that this device trusts.
        ConfigError: it is not there, and nobody wants to wait for it.
    """
    if settings.job in shown.others:
        raise OtherAggregator(settings.job, settings.state / TRUST_FILE)
    if settings.job not in shown.every and not settings.wait_for_broker:
        there = f"there are: {', '.join(shown.every)}" if shown.every else "there is none at all"
        raise ConfigError(
            f"there is no job {settings.job!r} at {settings.broker} ({there}); check --job, or "
            "leave --no-wait out to wait for it"
        )


def _only_job(
    scout: MqttTransport,
    settings: Settings,
    shown: ShownJobs,
    stopping: Callable[[], bool],
    waiting: Waiting,
) -> str:
    """Wait until exactly one job is shown that is not known to be finished.

    Raises:
        ConfigError: there are several, and nobody wants to wait.
    """
    passed_over: list[str] = []
    while not stopping():
        _look(scout, shown, stopping)
        for job in shown.others:
            if job not in passed_over:
                why = "passed over: signed by another aggregator than the one this device trusts"
                waiting.events.emit("refused", topic=topics.topic("job", job=job), reason=why)
                passed_over.append(job)
        if len(shown.unfinished) == 1:
            return shown.unfinished[0]
        if shown.unfinished and not settings.wait_for_broker:
            raise ConfigError(f"which job? There are {', '.join(shown.unfinished)}: say --job")
        if shown.every:
            waiting.say(*_why_no_job(settings, shown))
    return ""


def _why_no_job(settings: Settings, shown: ShownJobs) -> tuple[str, str]:
    """Return what is waited for, and why none of the jobs that are shown is taken."""
    if shown.unfinished:
        return "one job", f"there are {', '.join(shown.unfinished)}: say which with --job"
    if shown.finished:
        return "another job", f"finished: {', '.join(shown.finished)}"
    return "a job of the aggregator that this device trusts", (
        f"signed by another: {', '.join(shown.others)}; if that is right (the aggregator was set "
        f"up anew), remove {settings.state / TRUST_FILE} or use another --state"
    )


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
