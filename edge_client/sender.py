"""Updates on their way out: offered, sent as the aggregator asks for chunks, offered again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edge_client.outbox import Outbox, Pending
from protocol import topics
from protocol.chunks import split
from protocol.events import EventLog
from protocol.faults import fault_point
from protocol.link import DeviceLink
from protocol.messages import Control
from protocol.signing import SigningKey

RESEND_S = 30.0


class Sender:
    """Publish the outbox's updates; only the aggregator's word takes them out of it."""

    def __init__(
        self,
        link: DeviceLink,
        key: SigningKey,
        outbox: Outbox,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._key = key
        self._outbox = outbox
        self._events, self._clock = events, clock
        self._offered: tuple[str, int, float] = ("", 0, 0.0)
        """The update last offered, on which connection, and when it was last offered or sent."""

    def offer(self, upload: str) -> None:
        """Offer an update once a connection, and again when nobody has answered for a while.

        Raises:
            TransportError: the broker does not answer, or refuses the manifest.
        """
        if self._is_offered(upload) and self._clock() - self._offered[2] < RESEND_S:
            return
        pending = self._outbox.get(upload)
        if pending is None:
            return
        self._note(upload)
        manifest = pending.manifest
        topic = topics.topic(
            "upload_manifest", job=manifest.job, device=manifest.device, upload=upload
        )
        fault_point("device.manifest.offering")
        self._link.publish(topic, self._key.seal(manifest, topic)).check()
        fault_point("device.manifest.offered")

    def offer_again(self) -> None:
        """Let the next `offer` be made at once."""
        self._offered = ("", 0, 0.0)

    def take(self, answer: Control) -> bool:
        """Do what the aggregator says of an update; return True when that is settled and gone.

        Raises:
            TransportError: the broker does not answer, or refuses a chunk.
        """
        pending = self._outbox.get(answer.upload)
        if pending is None:
            return False
        manifest = pending.manifest
        if answer.kind == "need":
            self.send_chunks(pending, answer.chunks)
            return False
        if answer.kind == "wait":  # offered again like one that nobody has answered
            self._events.emit("waiting", round=manifest.round, reason=answer.reason)
            return False
        if answer.kind == "done":
            self._outbox.drop(answer.upload, counted_in=manifest.job)
        else:
            self._outbox.refuse(manifest)
            self._events.emit("rejected", round=manifest.round, reason=answer.reason)
        return True

    def send_chunks(self, pending: Pending, wanted: Sequence[int]) -> None:
        """Send the chunks that the aggregator says are missing.

        Nothing is sent before it has been offered on this connection: what was asked for before may
        be in by now, or may leave out what was lost since, and the answer to the offer knows.

        Raises:
            TransportError: the broker does not answer, or refuses a chunk.
        """
        fault_point("device.chunks.asked")
        manifest = pending.manifest
        if not self._is_offered(manifest.upload):
            return
        chunks = split(pending.data, manifest.file.chunk_bytes)
        place = {"job": manifest.job, "device": manifest.device, "upload": manifest.upload}

        def messages() -> Iterator[tuple[str, bytes]]:
            for index in wanted:
                if index < len(chunks):
                    fault_point("device.chunk.sending")
                    yield topics.topic("upload_chunk", **place, index=index), chunks[index]

        for delivery in self._link.publish_all(messages()):
            delivery.check()
        fault_point("device.chunks.sent")
        if self._is_offered(manifest.upload):
            self._note(manifest.upload)

    def _is_offered(self, upload: str) -> bool:
        return self._offered[:2] == (upload, self._link.connection)

    def _note(self, upload: str) -> None:
        self._offered = (upload, self._link.connection, self._clock())
