"""Clear what devices leave on a fleet's broker and the served job has no use for.

The broker's rules can't keep a device from publishing retained messages on its own topics, under
any job and any upload: nothing would ever take them away. So the aggregator of a fleet listens on
the devices' topics of all jobs. What is retained there and may not be is cleared, counted against
its device, and told of seldom. Nothing of a message is kept but counts.

Only for a broker that is the fleet's alone: elsewhere other jobs are other aggregators'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from paho.mqtt.client import topic_matches_sub

from aggregator.enrol.registry import Registry
from aggregator.intake import Intake
from protocol import topics
from protocol.errors import ProtocolError
from protocol.events import EventLog
from protocol.transport import Delivery, Incoming, MqttTransport

# The filter of upload chunks matches upload manifests too; both would bring them twice.
FILTERS = [topics.subscription(kind) for kind in ("status", "upload_chunk")]
SAY_S = 60.0
"""Between two lines about one device, and between two strikes against it."""
LOOK_S = 5.0
"""Between two looks at all that is retained: what came too fast for the queue is found by them."""
CLEARING_BYTES = 4 << 20
"""About what may be on its way to the broker, whose answers come behind all that it has sent us;
more waits for the next look."""
TOPIC_SHOWN = 200
_STRANGER = ""


@dataclass(slots=True)
class _Litter:
    """What has been found of one device since it was last told."""

    messages: int = 0
    topic: str = ""
    reason: str = ""
    at_fault: bool = False
    quiet_until: float = 0.0


class Sweeper:
    """Keep a fleet's broker clear for one job; `jobs` are all that the fleet has had."""

    def __init__(
        self,
        job: str,
        jobs: Collection[str],
        registry: Registry,
        intake: Intake,
        link: MqttTransport,
        events: EventLog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._jobs = {job, *jobs}
        self._registry = registry
        self._intake = intake
        self._link = link
        self._events = events
        self._clock = clock
        self._litter: dict[str, _Litter] = {}
        """By device; those that are not enrolled share one."""
        self._to_clear: list[str] = []
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
        if kind and job != self._job:
            self._note(device, incoming, "an upload for a job that is not served")
            return True
        return False

    def look_again(self) -> None:
        """Have the broker show what it retains, as long as the look before found something.

        It is also where what was found is told.
        """
        now, link = self._clock(), self._link
        if self._look_again and now >= self._look_next and link.connected and not link.awaited:
            self._look_again, self._look_next = False, now + LOOK_S
            link.show_again(FILTERS)
        self._tell()

    def refused(self, delivery: Delivery) -> bool:
        """Note that the broker does not let something be cleared, if that is what it refused."""
        if not _is_of_device(delivery.topic):
            return False
        litter = self._litter.setdefault(_STRANGER, _Litter())
        litter.messages += 1
        litter.topic = delivery.topic[:TOPIC_SHOWN]
        litter.reason = f"it can't be cleared: {delivery.refused}"
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
        litter = self._litter.setdefault(device, _Litter())
        litter.messages += 1
        litter.topic, litter.reason = incoming.topic[:TOPIC_SHOWN], reason
        litter.at_fault = litter.at_fault or at_fault
        if device != _STRANGER:
            self._intake.charge(device)

    def _tell(self) -> None:
        """Tell of each device at most once a minute, and strike it if it is at fault."""
        now = self._clock()
        for device, litter in self._litter.items():
            if litter.messages and now >= litter.quiet_until:
                self._events.emit(
                    "swept",
                    device=device,
                    messages=litter.messages,
                    topic=litter.topic,
                    reason=litter.reason,
                )
                if litter.at_fault:
                    self._intake.blame(device)
                self._litter[device] = _Litter(quiet_until=now + SAY_S)


def _is_of_device(topic: str) -> bool:
    return any(topic_matches_sub(each, topic) for each in FILTERS)


def _device(topic: str) -> str:
    """Return the device that a topic under FILTERS belongs to."""
    return topic.split("/")[4]
