"""Clear what devices leave on a fleet's broker and the served job has no use for.

The broker's rules can't keep a device from publishing retained messages on its own topics, under
any job and any upload: nothing would ever take them away. So the aggregator of a fleet listens on
the devices' topics of all jobs. What is retained there and may not be is cleared, counted against
its device, and told of seldom: nothing of a message is kept.

Only for a broker that is the fleet's alone: elsewhere other jobs are other aggregators'.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress

from paho.mqtt.client import topic_matches_sub

from aggregator.enrol.registry import Registry
from aggregator.intake import TOPIC_SHOWN, Intake
from aggregator.link import Link
from protocol import topics
from protocol.errors import ProtocolError
from protocol.events import EventLog, Seldom
from protocol.transport import Delivery, Incoming

# The filter of upload chunks matches upload manifests too; both would bring them twice.
FILTERS = [topics.subscription(kind) for kind in ("status", "upload_chunk")]
LOOK_S = 5.0
"""Between two looks at all that is retained: what came too fast for the queue is found by them."""
CLEARING_BYTES = 4 << 20
"""About what may be on its way to the broker, whose answers come behind all that it has sent us;
more waits for the next look."""
_STRANGER = ""


class Sweeper:
    """Keep a fleet's broker clear for one job; `jobs` are all that the fleet has had.

    A device that is at fault is struck as often as it is told of: once a minute.
    """

    def __init__(
        self,
        job: str,
        jobs: Collection[str],
        registry: Registry,
        intake: Intake,
        link: Link,
        events: EventLog,
    ) -> None:
        self._job = job
        self._jobs = {job, *jobs}
        self._registry = registry
        self._intake = intake
        self._link = link
        self._seldom = Seldom(events)
        self._look_next = 0.0
        self._look_again = False

    def subscribe(self) -> None:
        """Listen to all devices in all jobs; the broker shows at once what it retains of them."""
        self._link.subscribe(FILTERS, as_published=True)

    def takes(self, incoming: Incoming) -> bool:
        """Look at a message of a device; return whether it is dropped, and not for the intake."""
        if not _is_of_device(incoming.topic):
            return False
        device, job, kind = _device(incoming.topic), "", ""
        with suppress(ProtocolError):
            kind, fields = topics.match(incoming.topic)
            job = fields["job"]
        if self._registry.signing_key(device) is None:
            self._note(_STRANGER, incoming, "of a device that is not enrolled, or revoked")
            return False
        if kind == "status":
            if job not in self._jobs:
                self._note(device, incoming, "a status in a job that this fleet has never had")
            return job != self._job
        if incoming.retained:
            why = "retained, which of a device only its status is"
            self._note(device, incoming, why, at_fault=True)
            return True
        if job != self._job:
            why = "an upload for a job that is not served" if kind else "no upload's name"
            self._note(device, incoming, why)
            return True
        return False

    def look_again(self) -> None:
        """Have the broker show what it retains, as long as the look before found something."""
        now, link = time.monotonic(), self._link
        if self._look_again and now >= self._look_next and link.connected and not link.awaited:
            self._look_again, self._look_next = False, now + LOOK_S
            link.show_again(FILTERS)

    def refused(self, delivery: Delivery) -> bool:
        """Note that the broker does not let something be cleared, if that is what it refused."""
        if not _is_of_device(delivery.topic):
            return False
        why = f"it can't be cleared: {delivery.refused}"
        self._seldom.emit("refused", "swept", topic=delivery.topic[:TOPIC_SHOWN], reason=why)
        self._look_again = False
        return True

    def _note(
        self, device: str, incoming: Incoming, reason: str, *, at_fault: bool = False
    ) -> None:
        if incoming.retained and not incoming.payload:
            return  # its device has cleared it
        if incoming.retained:
            self._look_again = True
            if (self._link.awaited + 1) * len(incoming.topic) <= CLEARING_BYTES:
                self._link.post(incoming.topic, b"", retain=True)
        elif device == _STRANGER:
            return  # the intake tells of it
        told = self._seldom.emit(
            (device, at_fault),
            "swept",
            device=device,
            topic=incoming.topic[:TOPIC_SHOWN],
            reason=reason,
        )
        if told and at_fault:
            self._intake.blame(device)
        if device != _STRANGER:
            self._intake.charge(device, incoming.topic)


def _is_of_device(topic: str) -> bool:
    return any(topic_matches_sub(each, topic) for each in FILTERS)


def _device(topic: str) -> str:
    """Return the device that a topic under FILTERS belongs to."""
    return topic.split("/")[4]
