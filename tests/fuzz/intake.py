"""The aggregator's intake as a whole, as parsers of what devices send it."""

from __future__ import annotations

import io
from pathlib import Path

from pydantic import BaseModel

from aggregator.intake import Intake
from aggregator.quota import RoundBytes
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol.chunks import split
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.messages import Control, Status, UploadManifest
from protocol.signing import SigningKey, open_message
from tests.fuzz import corpus
from tests.fuzz.feeding import Parser
from tests.fuzz.mutate import mutated_header

OPEN = RoundState(corpus.ROUND, "open", 1, None)


class Refused(TunefleetError):
    """Stand for an input that the intake dropped or answered with a refusal."""


class IntakeUnderFire:
    """An intake with an open round, which goes on whatever it is sent."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.store._db.run("PRAGMA synchronous = OFF")  # nobody pulls the plug here
        self.store.bind_job(corpus.JOB)
        versions = Versions(corpus.JOB, self.store)
        self.store.add_version(versions.write(first_version(corpus.JOB), version=1, parent=None))
        self.store.set_round(OPEN)
        self.device, self.key = SigningKey.generate(), SigningKey.generate()
        self.events, self.time = io.StringIO(), 1e9
        log = EventLog(as_json=False, stream=self.events)
        self.intake = Intake(
            corpus.JOB, self.store, versions, self.key, log, clock=lambda: self.time
        )
        self.data = corpus.adapter_files()["int8"]
        self.status_topic, self.manifest_topic, self.chunk_topic = (
            corpus.TOPICS[n].decode() for n in (4, 5, 6)
        )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all but the device's key, and let quarantine and quotas run out."""
        self.time += 10_000
        self.intake._bytes = RoundBytes()
        for table in ("devices", "conduct", "uploads", "arrived"):
            self.store._db.run(f"DELETE FROM {table}")
        self.events.seek(0)
        self.events.truncate()
        status = Status(job="notes", device=corpus.DEVICE, online=True, boot=1)
        self.intake.handle(self.status_topic, self.device.seal(status, self.status_topic))
        assert self.store.devices.key(corpus.DEVICE) == self.device.public

    def send(self, topic: str, payload: bytes) -> list[Control]:
        """Let the intake handle a message, and return its answers once it is well afterwards."""
        answers = self.intake.handle(topic, payload)
        assert self.store.round() == OPEN
        assert self.store.devices.ready() <= {corpus.DEVICE, "x", "phone"}
        self.store.uploads.of_round(corpus.ROUND, "receiving", "counted", "rejected")
        assert all(line.isprintable() for line in self.events.getvalue().splitlines())
        return [open_message(p, t, Control, trusted=self.key.public)[0] for t, p in answers]

    def parsers(self) -> list[Parser]:
        key = self.device
        samples = [
            key.seal(message, topic)
            for message in corpus.messages()
            for topic in (self.status_topic, self.manifest_topic)
        ]
        topic_lines = [topic + b"\n" + data for topic in corpus.TOPICS for data in samples[6:10]]
        return [
            Parser("intake: any topic", [*topic_lines, corpus.TOPICS[6] + b"\n"], self.anything),
            Parser("intake: statuses", _bodies(Status), self.status),
            Parser("intake: manifests", _bodies(UploadManifest), self.manifest),
            Parser("intake: chunks", [self.data], self.chunk),
            Parser("intake: updates", [self.data], self.update, mutated_header),
        ]

    def anything(self, data: bytes) -> None:
        """Take the first line as the topic; the broker passes on UTF-8 alone."""
        self.begin_anew()
        topic, _, payload = data.partition(b"\n")
        self.send(topic.decode("utf-8", "replace"), payload)
        if self.events.getvalue():
            raise Refused

    def status(self, body: bytes) -> None:
        self.begin_anew()
        self.send(self.status_topic, corpus.seal(self.device, body, self.status_topic))
        if " refused " in self.events.getvalue():
            raise Refused

    def manifest(self, body: bytes) -> None:
        """Offer a manifest, then a chunk that may or may not be the one it names."""
        self.begin_anew()
        answers = self.send(
            self.manifest_topic, corpus.seal(self.device, body, self.manifest_topic)
        )
        self.send(self.chunk_topic, self.data)
        if [a.kind for a in answers] != ["need"]:
            raise Refused

    def chunk(self, data: bytes) -> None:
        self.begin_anew()
        sealed = self.device.seal(corpus.manifest(self.data), self.manifest_topic)
        assert [a.kind for a in self.send(self.manifest_topic, sealed)] == ["need"]
        if [a.kind for a in self.send(self.chunk_topic, data)] != ["done"]:
            raise Refused

    def update(self, data: bytes) -> None:
        """Offer any file, honestly described, so that its bytes are read."""
        self.begin_anew()
        sealed = self.device.seal(corpus.manifest(data), self.manifest_topic)
        answers = self.send(self.manifest_topic, sealed)
        if [a.kind for a in answers] == ["need"]:
            chunks = split(data)
            for index in answers[0].chunks:
                answers = self.send(self.chunk_topic[:-1] + str(index), chunks[index])
        assert [a.kind for a in answers] in (["done"], ["reject"])
        if answers[0].kind == "reject":
            raise Refused


def _bodies(model: type[BaseModel]) -> list[bytes]:
    return [m.model_dump_json().encode() for m in corpus.messages() if isinstance(m, model)]
