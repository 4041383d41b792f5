"""More processes that take uploads in, beside the aggregator that serves the job.

By an MQTT shared subscription the broker gives each message to one of them, so the chunks of one
upload reach several. They meet in the state folder: rows say what has come and what is asked for,
chunks are written in place in one file, and who has the last one verifies and counts. One process
at a time changes the state (`aggregator.turns`), commits, and only then acknowledges and answers.
Verifying, three quarters of an intake's work, needs no turn.

The session of such a process ends with its connection: what the broker had given it and it had not
committed is asked for again when the device offers its upload again. The serving aggregator alone
opens rounds, merges, hears statuses and publishes.
"""

from __future__ import annotations

import re

from aggregator.batch import take_in, with_those_behind
from aggregator.errors import ConfigError
from aggregator.intake import Intake, Outgoing
from aggregator.store import Store
from aggregator.versions import Versions
from protocol import topics
from protocol.errors import TransportError
from protocol.events import EventLog
from protocol.messages import Job
from protocol.patience import Waiting, connect_when_up
from protocol.signals import stop_on_signals
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, Incoming, MqttTransport

GROUP = "$share/intake/"
TICK_S = 0.2


def upload_filters(job: str, *, shared: bool) -> tuple[str, str]:
    """Return the filter of uploads to subscribe to, and the one that is for the other case.

    The filter of upload chunks matches upload manifests too; both would bring them twice.
    """
    alone = topics.subscription("upload_chunk", job=job)
    return (GROUP + alone, alone) if shared else (alone, GROUP + alone)


def check_name(name: str) -> str:
    """Return the name of an intake, if it is one.

    Raises:
        ConfigError: it is none.
    """
    if not re.fullmatch(topics.NAME, name):
        raise ConfigError(f"{name!a} can't name an intake: take small letters and digits, say 1")
    return name


class SharedIntake:
    """Take uploads of a job in until told to stop, by the policy that it is served with."""

    def __init__(
        self,
        name: str,
        job: str,
        store: Store,
        broker: BrokerAddress,
        events: EventLog,
        *,
        key: SigningKey,
    ) -> None:
        text = store.job()
        if text is None:
            raise ConfigError(
                f"no job has been served from {store.folder} yet: start `aggregator serve "
                "--shared-intake` first"
            )
        self._job = Job.model_validate_json(text)
        if self._job.job != job:
            raise ConfigError(
                f"{store.folder} is the state of job {self._job.job!r}, the job file of {job!r}: "
                "name the file that is served from there, or another folder with --state"
            )
        self._name, self._store, self._events = name, store, events
        self._stopping = False
        self._waiting = Waiting(events)
        self._link = MqttTransport(
            broker,
            f"tunefleet-aggregator-{self._job.job}-intake-{name}",
            temporary=True,
            on_outage=lambda why: self._waiting.say(f"the broker at {broker}", why),
        )
        versions = Versions(self._job, store)
        self._intake = Intake(self._job, store, versions, key, events, sharing=True)

    def run(self) -> None:
        """Take in; returns after SIGTERM or SIGINT.

        Raises:
            TransportError: the broker can't be reached, or the connection has ended for good.
        """
        with stop_on_signals(self._stop):
            try:
                if not connect_when_up(
                    self._link, self._waiting, stopping=lambda: self._stopping, wait=True
                ):
                    return
                self._link.subscribe([upload_filters(self._job.job, shared=True)[0]])
                self._events.emit("taking-in", job=self._job.job, intake=self._name)
                while not self._stopping:
                    if (first := self._link.receive(TICK_S)) is not None:
                        self._take_in(first)
            except TransportError:
                if not self._stopping:
                    raise
            finally:
                self._link.close()

    def _take_in(self, first: Incoming) -> None:
        """Deal with a message and those behind it, which are there before it takes its turn."""
        take_in(
            [*with_those_behind(first, self._link)],
            self._deal_with,
            self._link.post,
            store=self._store,
            link=self._link,
            intake=self._intake,
            events=self._events,
        )

    def _deal_with(self, incoming: Incoming) -> Outgoing:
        """Deal with a message by the rules that the serving process goes by now."""
        self._intake.policy = self._store.policy()
        return self._intake.handle(incoming.topic, incoming.payload)

    def _stop(self) -> None:
        self._stopping = True
        self._link.abandon()
