"""An aggregator's intake with an open round, and a device that talks to it with signed messages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.intake import Intake
from aggregator.rounds import Policy, RoundState
from aggregator.store import Store
from aggregator.updates import upload_stacks
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.chunks import split
from protocol.events import EventLog
from protocol.messages import (
    BaseModelInfo,
    Control,
    Job,
    Status,
    UploadManifest,
    describe_file,
    upload_id,
)
from protocol.signing import SigningKey, open_message
from protocol.tensors import Encoding

DEVICE, ROUND = "phone-1", 1
MODULES = {"model.layers.0.q": (300, 260), "model.layers.0.k": (3, 260)}
OPEN = RoundState(ROUND, "open", 1, None)


def make_job(encoding: Encoding = "f32", **more: Any) -> Job:
    base = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1000, modules=MODULES)
    fields = {"job": "notes", "base": base, "scale": 2.0, "ladder": [2, 64, 128]}
    return Job.model_validate({**fields, "encoding_up": encoding, **more})


class Aggregator:
    """An intake on a store with an open round, and a device that talks to it."""

    def __init__(self, folder: Path, job: Job, policy: Policy | None = None) -> None:
        self.folder, self.job, self.policy = folder, job, policy
        self.device_key, self.key = SigningKey.generate(), SigningKey.generate()
        self.store = Store(folder)
        self.store.bind_job(job)
        first = Versions(job, self.store).write(first_version(job), version=1, parent=None)
        self.store.add_version(first)
        self.store.set_round(OPEN)
        self._listen()

    def _listen(self) -> None:
        self.events = io.StringIO()
        log = EventLog(as_json=True, stream=self.events)
        versions = Versions(self.job, self.store)
        self.intake = Intake(self.job, self.store, versions, self.key, log, policy=self.policy)

    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.folder)
        self._listen()

    def heard(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.events.getvalue().splitlines()]

    def greet(self, device: str = DEVICE, key: SigningKey | None = None, boot: int = 1) -> None:
        topic = topics.topic("status", job=self.job.job, device=device)
        status = Status(job=self.job.job, device=device, online=True, boot=boot)
        assert self.intake.handle(topic, (key or self.device_key).seal(status, topic)) == []

    def manifest(self, data: bytes, **changed: Any) -> UploadManifest:
        fields: dict[str, Any] = {
            "job": "notes", "device": DEVICE, "round": ROUND, "version": 1, "rank": 64,
            "rank_trained": 64, "held": 128, "encoding": self.job.encoding_up,
            "file": describe_file(data), "examples": 10, **changed,
        }  # fmt: skip
        fields.setdefault("upload", upload_id(fields["device"], fields["job"], fields["round"]))
        return UploadManifest.model_validate(fields)

    def offer(self, manifest: UploadManifest, key: SigningKey | None = None) -> list[Control]:
        topic = topics.topic(
            "upload_manifest", job="notes", device=manifest.device, upload=manifest.upload
        )
        return self.read(self.intake.handle(topic, (key or self.device_key).seal(manifest, topic)))

    def chunk(self, manifest: UploadManifest, index: int, data: bytes) -> list[Control]:
        topic = topics.topic(
            "upload_chunk", job="notes", device=manifest.device, upload=manifest.upload, index=index
        )
        return self.read(self.intake.handle(topic, data))

    def deliver(self, manifest: UploadManifest, data: bytes) -> list[Control]:
        """Offer an update and send what is asked for; return the last answers."""
        answers, chunks = self.offer(manifest), split(data)
        while answers and answers[0].kind == "need":
            needed = answers.pop(0).chunks
            answers += [a for index in needed for a in self.chunk(manifest, index, chunks[index])]
        return answers

    def read(self, outgoing: list[tuple[str, bytes]]) -> list[Control]:
        expected = topics.topic("control", job="notes", device=DEVICE)
        assert {topic for topic, _ in outgoing} <= {expected}
        return [open_message(p, t, Control, trusted=self.key.public)[0] for t, p in outgoing]

    def counted(self) -> list[UploadManifest]:
        return self.store.uploads.of_round(ROUND, "counted")


def update(job: Job, size: float = 0.01, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of an update of rank 64 by DEVICE."""
    manifest = UploadManifest.model_construct(
        job="notes", device=DEVICE, round=ROUND, rank=64, rank_trained=64, held=128
    )
    rng = np.random.default_rng(0)
    found = {
        s.name: (size * rng.standard_normal(s.shape)).astype(np.float32)
        for s in upload_stacks(job, manifest)
    }
    return {**found, **changed}
