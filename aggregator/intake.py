"""Messages from devices: read, checked, stored, answered.

Every check of docs/protocol.md stands here or in what this calls. A bad upload is refused with a
reason and never stops a round; a message that can't be read is dropped and logged, and so is a
chunk that its manifest does not know, for anybody may have sent it. A device whose uploads are bad
time after time is kept out for a while. Where a fleet has a registry, nobody else is heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from aggregator.enrol.registry import Registry
from aggregator.personal.refusals import wrong_personal
from aggregator.quota import FILES_A_ROUND, Attempt, Bucket, RoundBytes
from aggregator.rounds import Policy, wanted_no_more
from aggregator.store import Store
from aggregator.updates import Verified, largest_upload, unfit, verify
from aggregator.versions import Versions
from aggregator.window import ChunkWindow, Window
from protocol import topics
from protocol.chunks import check_chunk
from protocol.errors import BadChunk, MalformedMessage, ProtocolError
from protocol.events import EventLog, Seldom
from protocol.faults import fault_point
from protocol.messages import Control, Job, Status, UploadManifest, upload_id
from protocol.signing import SigningKey, open_message

LIMITS_KEPT = 4096
TOPIC_SHOWN = 200
Outgoing = list[tuple[str, bytes]]


class Intake:
    """Take what devices send for one job, and say what to answer."""

    def __init__(
        self,
        job: Job,
        store: Store,
        versions: Versions,
        key: SigningKey,
        events: EventLog,
        *,
        policy: Policy | None = None,
        registry: Registry | None = None,
        sharing: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._job = job
        self._store = store
        self._versions = versions
        self._key = key
        self._events = events
        self.policy = policy or Policy()
        self._registry = registry
        self._clock = clock
        self._seldom = Seldom(events, clock)
        self._messages = Bucket()
        self._bytes = RoundBytes()
        self._sharing = sharing
        """Whether other processes take in on the same store: see `aggregator.shared_intake`."""
        self._window: Window = store.window if sharing else ChunkWindow()
        self._unfinished: list[UploadManifest] = []
        self._limits: dict[tuple[str, int, int, int, str | None], int] = {}
        self._asked_round = 0
        self._asked: set[tuple[str, int]] = set()
        """Chunks of this round that came broken and were asked for again: upload, index."""

    def handle(self, topic: str, payload: bytes) -> Outgoing:
        """Deal with one message; what it asked for is committed with the transaction around."""
        device = ""
        try:
            found = topics.match(topic)
            if "device" not in found.fields:
                raise MalformedMessage(topic, "devices don't publish there: it is no topic of one")
            device = found.fields["device"]
            if self._registry is not None and self._registry.signing_key(device) is None:
                raise MalformedMessage(topic, "this device is not enrolled, or has been revoked")
            if found.kind == "upload_chunk":
                return self._chunk(found.fields, topic, payload)
            if not self.charge(device, topic):
                return []
            if found.kind == "status":
                return self._status(device, topic, payload)
            if found.kind == "upload_manifest":
                return self._manifest(device, topic, payload)
        except ProtocolError as error:
            self._refuse(device, topic, error)
        return []

    def charge(self, device: str, topic: str) -> bool:
        """Count a message against what a device may send; False when it has sent too much.

        A device at that is told of, and where only it can have sent them struck, once a minute.
        """
        if self._messages.take(device, self._clock()):
            return True
        shown = topic[:TOPIC_SHOWN]
        told = self._seldom.emit(
            device, "flooding", device=device, topic=shown, reason="too many messages: dropped"
        )
        if told and self._registry is not None:
            self.blame(device)
        return False

    def blame(self, device: str) -> None:
        """Bring a device nearer to quarantine."""
        until = self._clock() + self.policy.quarantine_s
        if self._store.devices.strike(device, self.policy.quarantine_after, until):
            self._events.emit("quarantined", device=device, until=until)

    def _refuse(self, device: str, topic: str, error: Exception) -> None:
        """Log what can't be taken, as long as there is not too much of it."""
        if self._messages.take(f"log of {device}", self._clock()):
            self._events.emit("refused", topic=topic, reason=str(error))

    def _device_key(self, device: str) -> str | None:
        """Return the key that a device signs with: pinned at enrolment, or else at first sight."""
        if self._registry is not None:
            return self._registry.signing_key(device)
        return self._store.devices.key(device)

    # -- the kinds -------------------------------------------------------------------------------

    def _status(self, device: str, topic: str, payload: bytes) -> Outgoing:
        if not payload:
            return []
        status, key = open_message(payload, topic, Status, trusted=self._device_key(device))
        if status.device != device or status.job != self._job.job:
            raise MalformedMessage(topic, "it speaks of another device or job")
        before = self._store.devices.status(device)
        if not self._store.devices.set_status(status, key):
            raise MalformedMessage(
                topic, f"it is of start {status.boot}, a later one has been heard"
            )
        if before != status:
            self._events.emit(
                "device",
                device=device,
                online=status.online,
                state=status.state,
                rank=status.rank,
                detail=status.detail,
            )
        return []

    def _manifest(self, device: str, topic: str, payload: bytes) -> Outgoing:
        key = self._device_key(device)
        if key is None:
            raise MalformedMessage(topic, "the device has not said who it is (no status)")
        manifest, _ = open_message(payload, topic, UploadManifest, trusted=key)
        expected = upload_id(manifest.device, manifest.job, manifest.round, manifest.attempt)
        named = topics.match(topic).fields["upload"]
        if (manifest.device, manifest.job) != (device, self._job.job) or not (
            manifest.upload == expected == named
        ):
            raise MalformedMessage(topic, "it speaks of another device, job or upload")
        if self._store.uploads.has_counted(device, manifest.round):
            return [self._answer(manifest, "done")]
        known = self._store.uploads.known(manifest.upload)
        if known is not None and known.state == "rejected" and known.manifest == manifest:
            return [self._answer(manifest, "reject", reason=known.reason)]
        if why := self._late(manifest) or self._kept_out(device):
            return self._reject(manifest, why, at_fault=False)
        if why := self._unfit(manifest):
            return self._reject(manifest, why)
        if not self._store.has_room(manifest.file.bytes):
            why = "the aggregator's disk is full; it takes the update once there is room again"
            self._seldom.emit(("full", device), "full", device=device, round=manifest.round)
            return [self._answer(manifest, "wait", reason=why)]
        fault_point("aggregator.manifest.received")
        self._store.uploads.expect(manifest)
        fault_point("aggregator.manifest.expected")
        return self._go_on(manifest)

    def _chunk(self, fields: Mapping[str, str], topic: str, payload: bytes) -> Outgoing:
        device, number = fields["device"], int(fields["index"])
        known = self._store.uploads.known(fields["upload"])
        if known is None or known.manifest.device != device or known.state != "receiving":
            self.charge(device, topic)
            return []
        manifest = known.manifest
        info = manifest.file
        self._bytes.add(device, self._attempt(), len(payload))
        if self._sent_too_much(manifest):
            return self._reject(manifest, self._too_much(manifest))
        try:
            check_chunk(number, payload, info.chunks, info.chunk_bytes, info.bytes)
        except BadChunk as error:
            self._refuse(device, topic, error)
            return self._ask_again(manifest, number)
        if why := self._late(manifest) or self._kept_out(device):
            return self._reject(manifest, why, at_fault=False)
        fault_point("aggregator.chunk.received")
        self._store.uploads.add_chunk(manifest, number, payload)
        if self._store.uploads.is_complete(manifest):
            return self._complete(manifest)
        return self._ask_more(manifest, number)

    # -- what follows ----------------------------------------------------------------------------

    def _go_on(self, manifest: UploadManifest) -> Outgoing:
        missing = self._store.uploads.missing_chunks(manifest)
        if not missing:
            return self._complete(manifest)
        first = self._window.ask(manifest.device, manifest.upload, missing)
        return [self._answer(manifest, "need", chunks=first)]

    def _ask_more(self, manifest: UploadManifest, number: int) -> Outgoing:
        more = self._window.arrived(manifest.device, manifest.upload, number)
        return [self._answer(manifest, "need", chunks=more)] if more else []

    def _ask_again(self, manifest: UploadManifest, number: int) -> Outgoing:
        """Ask for a chunk that came broken: once, after that when the device offers again.

        Chunks are not signed. Whoever can write to the topic can send broken ones without end; that
        must neither cost the device its update nor have it send one without end.
        """
        now = self._store.round()
        if self._asked_round != now.number:
            self._asked_round, self._asked = now.number, set()
        asked = (manifest.upload, number) in self._asked
        if (
            asked
            or self._late(manifest)
            or number not in self._store.uploads.missing_chunks(manifest)
        ):
            return []
        self._asked.add((manifest.upload, number))
        return [self._answer(manifest, "need", chunks=[number])]

    def _complete(self, manifest: UploadManifest) -> Outgoing:
        """Verify a complete upload and count or refuse it, or do so in the next `finish`."""
        if self._sharing:
            self._unfinished.append(manifest)
            return []
        try:
            data = self._assembled(manifest)
        except BadChunk as error:
            return self._reject(manifest, str(error))
        return self._settle(manifest, verify(self._job, self._versions, manifest, data))

    def finish(self) -> Outgoing:
        """Verify what is complete while other processes may have the turn, then count or refuse it.

        Of an upload that is gone since, or that another process has counted, nothing more is said.
        """
        answers: Outgoing = []
        while self._unfinished:
            manifest = self._unfinished.pop()
            try:
                with self._store.turn():
                    if not self._is_receiving(manifest):
                        continue
                    data = self._assembled(manifest)
                found = verify(self._job, self._versions, manifest, data)
            except BadChunk as error:
                found = Verified(str(error))
            with self._events.held(), self._store.transaction():
                if not self._is_receiving(manifest):
                    continue
                if why := self._late(manifest) or self._kept_out(manifest.device):
                    answers += self._reject(manifest, why, at_fault=False)
                else:
                    answers += self._settle(manifest, found)
        return answers

    def _assembled(self, manifest: UploadManifest) -> bytes:
        data = self._store.uploads.assembled(manifest)
        fault_point("aggregator.upload.assembled")
        return data

    def _is_receiving(self, manifest: UploadManifest) -> bool:
        known = self._store.uploads.known(manifest.upload)
        return known is not None and (known.manifest, known.state) == (manifest, "receiving")

    def _settle(self, manifest: UploadManifest, found: Verified) -> Outgoing:
        """Count or refuse a complete upload."""
        if found.wrong:
            return self._reject(manifest, found.wrong)
        fault_point("aggregator.upload.verified")
        now = self._store.round().number
        behind = now - manifest.round
        buffered = self.policy.buffer > 0
        late_for = now if behind else None
        self._store.uploads.count(manifest, late_for=late_for, buffered=buffered)
        self._store.devices.forgive(manifest.device)
        self._events.emit(
            "counted",
            device=manifest.device,
            round=now,
            behind=behind,
            rank=manifest.rank,
            bytes=manifest.file.bytes,
            norm=found.change,
            metrics=manifest.metrics,
        )
        return [self._answer(manifest, "done")]

    def _late(self, manifest: UploadManifest) -> str:
        """Say why an upload is not wanted now, through no fault of it; empty if it is."""
        now = self._store.round()
        return wanted_no_more(
            manifest,
            now,
            self.policy,
            another_counts=lambda: self._store.uploads.has_counted(manifest.device, now.number),
            was_left=lambda: self._store.history.left(manifest.round, now.number),
            is_kept=lambda version: self._store.version(version) is not None,
        )

    def _kept_out(self, device: str) -> str:
        """Say until when a device is in quarantine; empty if it is not."""
        until = self._store.devices.quarantine(device)
        if self._clock() >= until:
            return ""
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until))
        return f"too much of what it sent was refused: it is in quarantine until {when}"

    def _unfit(self, manifest: UploadManifest) -> str:
        """Say what is wrong with an upload, from its manifest alone; empty if nothing is."""
        if why := unfit(self._job, manifest):
            return why
        if why := self._wrong_personal(manifest):
            return why
        if self._sent_too_much(manifest):
            return self._too_much(manifest)
        return ""

    def _wrong_personal(self, manifest: UploadManifest) -> str:
        round_starts = self._store.version(manifest.version)
        assert round_starts is not None, "it is the open round's"
        return wrong_personal(manifest, round_starts, self._job)

    def _attempt(self) -> Attempt:
        now = self._store.round()
        return now.number, now.attempt

    def _sent_too_much(self, manifest: UploadManifest) -> bool:
        sent = self._bytes.sent(manifest.device, self._attempt())
        return sent > self._round_limit(manifest)

    def _round_limit(self, manifest: UploadManifest) -> int:
        """Return the bytes that a device may send in an attempt; worked out once."""
        ranks = manifest.rank, manifest.rank_trained, manifest.held
        key = (manifest.upload, *ranks, manifest.modules)
        if key not in self._limits:
            if len(self._limits) >= LIMITS_KEPT:
                self._limits.clear()
            self._limits[key] = FILES_A_ROUND * largest_upload(self._job, manifest)
        return self._limits[key]

    def _too_much(self, manifest: UploadManifest) -> str:
        return f"it sent more than {self._round_limit(manifest)} bytes in this round"

    def _reject(self, manifest: UploadManifest, reason: str, *, at_fault: bool = True) -> Outgoing:
        """Refuse an upload; whose device is at fault comes nearer to quarantine.

        One that is of no matter to the open round leaves nothing: a device can make up any number.
        """
        device, told = manifest.device, {"round": manifest.round, "reason": reason}
        if at_fault or (manifest.round, manifest.attempt) == self._attempt():
            self._store.uploads.reject(manifest, reason)
        else:
            self._store.uploads.forget(manifest)
        if at_fault:
            self._events.emit("rejected", device=device, **told)
            self.blame(device)
        else:
            self._seldom.emit(("rejected", device), "rejected", device=device, **told)
        return [self._answer(manifest, "reject", reason=reason)]

    def _answer(
        self,
        manifest: UploadManifest,
        kind: str,
        *,
        chunks: list[int] | None = None,
        reason: str = "",
    ) -> tuple[str, bytes]:
        message = Control.model_validate(
            {
                "job": manifest.job,
                "device": manifest.device,
                "upload": manifest.upload,
                "kind": kind,
                "chunks": chunks or [],
                "reason": reason[:500],  # some quote what the device sent, however long
            }
        )
        topic = topics.topic("control", job=manifest.job, device=manifest.device)
        return topic, self._key.seal(message, topic)
