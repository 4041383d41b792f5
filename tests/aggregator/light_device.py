"""A device without a model, on a real broker: outbox, sender and trust are those of the agent.

In place of training it calls a function that returns the tensors of an update.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.updates import upload_stacks
from edge_client.outbox import Outbox
from edge_client.sender import Sender
from edge_client.trust import open_trusted
from protocol import topics
from protocol.cohort import in_cohort
from protocol.events import EventLog
from protocol.messages import (
    Control,
    Job,
    Round,
    Status,
    UploadManifest,
    describe_file,
    upload_id,
)
from protocol.signing import SigningKey
from protocol.tensors import encode
from protocol.transport import BrokerAddress, Incoming, MqttTransport, TlsFiles
from tests.faults.processes import PATIENCE_S

RANK = 2
Learn = Callable[[Round], float]


class LightDevice:
    """Take part in a job until told to stop; `learn` gives the size of a round's update."""

    def __init__(
        self,
        broker: BrokerAddress,
        folder: Path,
        name: str,
        job: Job,
        learn: Learn,
        *,
        tls: TlsFiles | None = None,
    ) -> None:
        self.name, self.job, self.learn, self.folder = name, job, learn, folder
        self.manifests: dict[int, UploadManifest] = {}
        """Of what was made last in each round."""
        self.trained: list[tuple[int, int]] = []
        """Round and attempt."""
        self.round: Round | None = None
        self.metrics: dict[str, float] = {}
        self._log = io.StringIO()
        self.outbox = Outbox(folder)
        key = SigningKey.load_or_create(folder / "device.key")
        self.link = MqttTransport(broker, f"tunefleet-{name}", tls=tls)
        self.link.connect()
        self._sender = Sender(self.link, key, self.outbox, EventLog(as_json=True, stream=self._log))
        place = {"job": job.job, "device": name}
        self.link.subscribe([topics.topic("round", job=job.job), topics.topic("control", **place)])
        topic = topics.topic("status", **place)
        self._status = Status(job=job.job, device=name, online=True, boot=self.outbox.next_boot())
        self._say = lambda status: self.link.publish(topic, key.seal(status, topic), retain=True)
        self._say(self._status).check()

    def events(self, kind: str) -> list[dict[str, Any]]:
        every = [json.loads(line) for line in self._log.getvalue().splitlines()]
        return [event for event in every if event["event"] == kind]

    def step(self) -> None:
        """Take in one message, or do what is to be done."""
        incoming = self.link.receive(0.05)
        if incoming is not None:
            self.link.ack(incoming)
            self._take(incoming)
        elif pending := self.outbox.pending():
            self._sender.offer(pending[0])
        elif (
            (now := self.round)
            and now.state == "open"
            and self.outbox.is_due(now)
            and in_cohort(self.name, now.job, now.number, now.fraction)
        ):
            self._train(now)

    def offer_again(self) -> None:
        """Do not wait until the last offer has been without an answer for long."""
        self._sender.offer_again()

    def leave(self) -> None:
        """Say that it is offline, as its will would, and end."""
        self._say(self._status.model_copy(update={"online": False})).check()
        self.close()

    def close(self) -> None:
        self.link.close()
        self.outbox.close()

    def _take(self, incoming: Incoming) -> None:
        if topics.match(incoming.topic).kind == "round":
            now = open_trusted(incoming, Round, self.folder)
            self.outbox.check_round(now)
            self.round = now
            self._sender.offer_again()
        else:
            self._sender.take(open_trusted(incoming, Control, self.folder))

    def _train(self, now: Round) -> None:
        self.trained.append((now.number, now.attempt))
        fields = {
            "job": now.job, "device": self.name, "round": now.number, "attempt": now.attempt,
            "upload": upload_id(self.name, now.job, now.number, now.attempt),
            "version": now.version, "rank": RANK, "rank_trained": RANK, "held": self.job.rank,
            "encoding": self.job.encoding_up, "examples": 10,
            "metrics": self.metrics,
        }  # fmt: skip
        wanted = upload_stacks(self.job, UploadManifest.model_construct(**fields))
        size = np.float32(self.learn(now))
        data = encode({s.name: np.full(s.shape, size) for s in wanted}, self.job.encoding_up)
        said, behind = self.said(now)
        data += behind
        manifest = UploadManifest.model_validate({"file": describe_file(data), **fields, **said})
        self.manifests[now.number] = manifest
        self.outbox.put(manifest, data, rank=RANK)

    def said(self, now: Round) -> tuple[dict[str, Any], bytes]:
        """Return more fields of a round's manifest, and what comes behind the update's tensors."""
        return {}, b""


def run_until(done: Callable[[], bool], *devices: LightDevice) -> None:
    """Let devices take part in turn until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "what was waited for did not come"
        for device in devices:
            device.step()
