"""Messages of devices, taken in together: committed at once, then acknowledged and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from aggregator.intake import Intake, Outgoing
from aggregator.link import Link
from aggregator.store import Store
from protocol.events import EventLog
from protocol.faults import fault_point
from protocol.transport import Incoming, MqttTransport

BATCH = 32
"""Messages that are committed together."""


def with_those_behind(first: Incoming, link: Link | MqttTransport) -> Iterator[Incoming]:
    """Yield a message and those that have come since, up to a batch."""
    yield first
    for _ in range(BATCH - 1):
        if (incoming := link.receive(0)) is None:
            return
        yield incoming


def take_in(
    batch: Iterable[Incoming],
    deal_with: Callable[[Incoming], Outgoing],
    answer: Callable[[str, bytes], None],
    *,
    store: Store,
    link: Link | MqttTransport,
    intake: Intake,
    events: EventLog,
) -> int:
    """Deal with messages in one transaction, acknowledge and answer them; return how many.

    Raises:
        StoreError: the disk is full, or not in order; none of them is acknowledged.
    """
    taken: list[Incoming] = []
    answers: Outgoing = []
    with events.held(), store.transaction():
        for incoming in batch:
            answers += deal_with(incoming)
            taken.append(incoming)
        fault_point("aggregator.messages.handled")
    fault_point("aggregator.messages.committed")
    for incoming in taken:
        link.ack(incoming)
    fault_point("aggregator.messages.acked")
    answers += intake.finish()
    for topic, payload in answers:
        answer(topic, payload)
        fault_point("aggregator.message.answered")
    return len(taken)
