"""An artifact set on the broker: devices without torch fetch it, to train with ONNX Runtime.

A set is large beside a version, so it is read and published a few chunks at a time between other
work, and only if the broker has not kept it: its manifest, which comes last, says that it has. What
of another set was begun before is cleared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aggregator.errors import ConfigError, StoreError
from aggregator.link import Link
from protocol import topics
from protocol.artifact import (
    AGAIN,
    ALL_FILES,
    MANIFEST,
    BadArtifact,
    artifact_id,
    check_artifact,
    sha256_of,
)
from protocol.chunks import CHUNK_BYTES, chunk_count, chunk_hash
from protocol.errors import DeliveryRefused, ProtocolError, os_words
from protocol.events import EventLog
from protocol.files import write_durably
from protocol.messages import ARTIFACT_CHUNKS, ArtifactFile, ArtifactManifest, Job
from protocol.signing import SigningKey, open_message
from protocol.transport import Incoming

SLICE = 32
"""Chunks that are published before other work goes on."""
QUIET_S = 2.0
"""How long a broker may take to show the manifest that it keeps."""
RECORD = "onnx.json"
"""In the state folder: the manifest of the set whose chunks the broker may have."""

Message = tuple[str, bytes]


def open_set(folder: Path, job: Job) -> ArtifactManifest:
    """Check an artifact set for a job, and describe its files as they travel.

    Raises:
        ConfigError: it is not whole, too large, or of another base than the job's.
    """
    try:
        artifact = check_artifact(folder)
        sizes = {name: (folder / name).stat().st_size for name in ALL_FILES}
        for name in (name for name, size in sizes.items() if not size):
            raise ConfigError(f"--onnx: {folder / name} is empty; {AGAIN}")
        if sum(map(chunk_count, sizes.values())) > ARTIFACT_CHUNKS:
            raise ConfigError(
                f"the artifact set in {folder} has {sum(sizes.values()) / 2**20:.0f} MiB; at most "
                f"{ARTIFACT_CHUNKS * CHUNK_BYTES >> 20} are published: leave --onnx out, and copy "
                "it to the devices by hand"
            )
        if artifact.base_sha256 != job.base.sha256 or artifact.modules != dict(job.base.modules):
            raise ConfigError(
                f"the artifact set in {folder} is of {artifact.name!r} (hash "
                f"{artifact.base_sha256[:12]}…), not of the job's {job.base.name!r} (hash "
                f"{job.base.sha256[:12]}…): export that one, and give it with --onnx"
            )
        return ArtifactManifest(
            job=job.job,
            artifact=artifact_id((folder / MANIFEST).read_bytes()),
            base_sha256=artifact.base_sha256,
            files={name: _describe(folder / name, size) for name, size in sizes.items()},
        )
    except BadArtifact as error:
        raise ConfigError(f"--onnx: {error}") from None
    except OSError as error:
        raise ConfigError(f"--onnx: can't read {folder}: {os_words(error)}") from None


def _describe(path: Path, size: int) -> ArtifactFile:
    hashes = [chunk_hash(chunk) for chunk in _chunks(path)]
    return ArtifactFile(bytes=size, sha256=sha256_of(path), chunks=hashes)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def topics_of(manifest: ArtifactManifest) -> list[str]:
    """Return the topics of a set, that of its manifest first."""
    names = [topics.topic("onnx_manifest", job=manifest.job)]
    for file, info in manifest.files.items():
        names += [_chunk_topic(manifest, file, index) for index in range(len(info.chunks))]
    return names


def _chunk_topic(manifest: ArtifactManifest, file: str, index: int) -> str:
    place = {"job": manifest.job, "artifact": manifest.artifact}
    return topics.topic("onnx_chunk", **place, file=file, index=index)


class ArtifactPublisher:
    """Keep one artifact set of a job on the broker, or none (`folder` is None).

    Raises:
        ConfigError: see `open_set`.
    """

    def __init__(
        self,
        job: Job,
        folder: Path | None,
        state: Path,
        key: SigningKey,
        link: Link,
        events: EventLog,
        meanwhile: Callable[[], None],
    ) -> None:
        self._topic = topics.topic("onnx_manifest", job=job.job)
        self._folder, self._record = folder, state / RECORD
        self._manifest = None if folder is None else open_set(folder, job)
        self._key, self._link, self._events, self._meanwhile = key, link, events, meanwhile
        self._look_until: float | None = None
        self._work: Iterator[list[Message]] | None = None

    def connected(self) -> None:
        """See on a new connection whether the broker keeps the set; `step` does what is to be."""
        self._work = None
        if self._manifest is None:
            self._work = self._clear_others()
            return
        self._link.subscribe([self._topic])
        self._link.show_again([self._topic])
        self._look_until = time.monotonic() + QUIET_S

    def takes(self, incoming: Incoming) -> bool:
        """Take the manifest that the broker shows; False: the message is another."""
        if incoming.topic != self._topic:
            return False
        try:
            kept, _ = open_message(
                incoming.payload, self._topic, ArtifactManifest, trusted=self._key.public
            )
        except ProtocolError:
            return True  # nobody's, or of another key: ours takes its place
        if self._look_until is not None and kept == self._manifest:
            self._look_until = None
            self._work = self._clear_others()
        return True

    def step(self) -> None:
        """Publish or clear a few chunks, if any are left to be.

        What keeps it from that is told: the job goes on without the set, until a new connection.

        Raises:
            TransportError: the broker does not answer.
        """
        if self._look_until is not None and time.monotonic() >= self._look_until:
            self._look_until, self._work = None, self._publish()
        if self._work is None:
            return
        try:
            messages = next(self._work, None)
            if messages is None:
                self._work = None
                return
            sent = self._link.publish_all(messages, retain=True, meanwhile=self._meanwhile)
            for delivery in sent:
                delivery.check()
        except (StoreError, DeliveryRefused) as error:
            self._work = None
            self._events.emit("onnx", state="failed", reason=str(error))

    def _publish(self) -> Iterator[list[Message]]:
        """Yield what puts the set on the broker, its manifest last."""
        manifest = self._manifest
        assert manifest is not None and self._folder is not None
        yield from self._clear_others()
        self._remember(manifest)
        told = {"artifact": manifest.artifact, "bytes": manifest.bytes}
        self._events.emit("onnx", state="publishing", **told)
        batch: list[Message] = []
        for file, info in manifest.files.items():
            for index, chunk in enumerate(self._read(self._folder / file, info)):
                batch.append((_chunk_topic(manifest, file, index), chunk))
                if len(batch) == SLICE:
                    yield batch
                    batch = []
        yield [*batch, (self._topic, self._key.seal(manifest, self._topic))]
        self._events.emit("onnx", state="published", **told)

    def _read(self, path: Path, info: ArtifactFile) -> Iterator[bytes]:
        count = 0
        try:
            for count, chunk in enumerate(_chunks(path), start=1):
                if count > len(info.chunks) or chunk_hash(chunk) != info.chunks[count - 1]:
                    raise StoreError(f"{path} has changed; export it anew, and start again")
                yield chunk
        except OSError as error:
            raise StoreError(f"can't read {path}: {os_words(error)}") from None
        if count != len(info.chunks):
            raise StoreError(f"{path} has changed; export it anew, and start again")

    def _clear_others(self) -> Iterator[list[Message]]:
        """Yield what takes a set off the broker that is not this one."""
        try:
            begun = ArtifactManifest.model_validate_json(self._record.read_bytes())
        except (OSError, ValueError):  # none was begun, or it can't be known any more
            return
        if self._manifest is not None and begun.artifact == self._manifest.artifact:
            return
        names = topics_of(begun)
        for start in range(0, len(names), SLICE):
            yield [(name, b"") for name in names[start : start + SLICE]]
        self._record.unlink(missing_ok=True)
        self._events.emit("onnx", state="cleared", artifact=begun.artifact, bytes=begun.bytes)

    def _remember(self, manifest: ArtifactManifest) -> None:
        try:
            write_durably(self._record, manifest.model_dump_json().encode())
        except OSError as error:
            raise StoreError(f"can't write {self._record}: {os_words(error)}") from None
