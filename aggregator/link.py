"""One connection to the broker, in which several jobs have a part each.

A fleet's broker knows the aggregator by its certificate, and gives it one session. So jobs that are
served together share a connection: what comes is sorted by the job in its topic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from protocol.notify import alive
from protocol.patience import Waiting
from protocol.transport import BrokerAddress, Delivery, Incoming, MqttTransport, TlsFiles

Meanwhile = Callable[[], object] | None


class Link(Protocol):
    """What a job needs of a connection; see protocol.transport.MqttTransport."""

    @property
    def address(self) -> BrokerAddress: ...
    @property
    def connected(self) -> bool: ...
    @property
    def connection(self) -> int: ...
    @property
    def awaited(self) -> int: ...
    def connect(self, timeout_s: float = ..., stopping: Callable[[], bool] = ...) -> None: ...
    def close(self) -> None: ...
    def subscribe(self, filters: list[str], *, as_published: bool = ...) -> None: ...
    def show_again(self, filters: list[str]) -> None: ...
    def receive(self, timeout_s: float) -> Incoming | None: ...
    def ack(self, incoming: Incoming) -> None: ...
    def post(self, topic: str, payload: bytes, *, retain: bool = ...) -> None: ...
    def refused(self) -> list[Delivery]: ...
    def publish_all(
        self,
        messages: Iterable[tuple[str, bytes]],
        *,
        retain: bool = ...,
        timeout_s: float = ...,
        meanwhile: Meanwhile = ...,
    ) -> list[Delivery]: ...


def own_link(
    broker: BrokerAddress, name: str, tls: TlsFiles | None, waiting: Waiting
) -> MqttTransport:
    """Return a link whose session at the broker has an aggregator's name, or its certificate's."""

    def away(why: str) -> None:
        alive()  # who waits for a broker does not hang
        waiting.say(f"the broker at {broker}", why)

    return MqttTransport(broker, f"tunefleet-aggregator-{name}", tls=tls, on_outage=away)


class SharedLink:
    """Sort what comes on a connection to the jobs that have a part in it.

    What is of no job here is the first one's, whose sweeper looks at it.
    """

    def __init__(self, link: MqttTransport) -> None:
        self.link = link
        self._parts: dict[str, JobLink] = {}

    def part(self, job: str) -> JobLink:
        """Return a job's part, made if need be: from now on it is given what comes for the job."""
        if job not in self._parts:
            self._parts[job] = JobLink(self, job)
        return self._parts[job]

    def leave(self, part: JobLink) -> None:
        """Keep nothing more for a job; what it has not acknowledged, the broker keeps."""
        self._parts = {job: each for job, each in self._parts.items() if each is not part}

    def sort_next(self, timeout_s: float) -> JobLink | None:
        """Give the next message to whose it is; return whose, None when none came in time.

        Raises:
            TransportError: the connection has ended for good.
        """
        incoming = self.link.receive(timeout_s)
        if incoming is None:
            return None
        part = self._of(incoming.topic)
        part.messages.append(incoming)
        return part

    @property
    def has_messages(self) -> bool:
        return any(part.messages for part in self._parts.values())

    def sort_refused(self) -> None:
        for delivery in self.link.refused():
            self._of(delivery.topic).undelivered.append(delivery)

    def _of(self, topic: str) -> JobLink:
        levels = topic.split("/", 3)
        named = self._parts.get(levels[2]) if len(levels) > 2 else None
        return named or next(iter(self._parts.values()))


class JobLink:
    """One job's part in a connection."""

    def __init__(self, shared: SharedLink, job: str) -> None:
        self._shared, self._link = shared, shared.link
        self.job = job
        self.messages: deque[Incoming] = deque()
        self.undelivered: deque[Delivery] = deque()
        self._take: Meanwhile = None
        """Takes in one message, once the job does so at all."""

    @property
    def address(self) -> BrokerAddress:
        return self._link.address

    @property
    def connected(self) -> bool:
        return self._link.connected

    @property
    def connection(self) -> int:
        return self._link.connection

    @property
    def awaited(self) -> int:
        return self._link.awaited

    def connect(self, timeout_s: float = 10.0, stopping: Callable[[], bool] = bool) -> None:
        """Connect, if no job before has."""
        if not self._link.connection:
            self._link.connect(timeout_s, stopping)

    def close(self) -> None:
        self._shared.leave(self)

    def subscribe(self, filters: list[str], *, as_published: bool = False) -> None:
        self._link.subscribe(filters, as_published=as_published)

    def show_again(self, filters: list[str]) -> None:
        self._link.show_again(filters)

    def receive(self, timeout_s: float) -> Incoming | None:
        """Return this job's next message; None when none came in time, or one for another job."""
        if not self.messages:
            self._shared.sort_next(timeout_s)
        return self.messages.popleft() if self.messages else None

    def ack(self, incoming: Incoming) -> None:
        self._link.ack(incoming)

    def post(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._link.post(topic, payload, retain=retain)

    def refused(self) -> list[Delivery]:
        self._shared.sort_refused()
        found = list(self.undelivered)
        self.undelivered.clear()
        return found

    def publish_all(
        self,
        messages: Iterable[tuple[str, bytes]],
        *,
        retain: bool = False,
        timeout_s: float = 30.0,
        meanwhile: Meanwhile = None,
    ) -> list[Delivery]:
        """Publish as the connection does; meanwhile every job takes in what comes for it."""
        self._take = meanwhile or self._take
        return self._link.publish_all(
            _told(messages),
            retain=retain,
            timeout_s=timeout_s,
            meanwhile=self._take_in_next if meanwhile else None,
        )

    def _take_in_next(self) -> None:
        part = self._shared.sort_next(0)
        if part is not None and part._take is not None:
            part._take()


def _told(messages: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Tell systemd of each message that is handed to the broker, which takes them by the window."""
    for message in messages:
        alive()
        yield message
