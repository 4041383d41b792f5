"""Fetch the artifact set that a job offers, for a device that would train with ONNX Runtime.

    manifest → (in the cache already?) → chunks, some at a time → files checked → cache

Chunks are asked for by their own topics, in order, so that no more than WINDOW of them are on their
way, and are appended to files: what is there is what a device goes on from after a cut or a kill.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from edge_client.config import Settings
from edge_client.errors import ModelError
from edge_client.ort.artifact import CACHED_SETS, check_artifact
from edge_client.storage import keeping
from edge_client.trust import open_trusted
from protocol import topics
from protocol.artifact import MANIFEST, artifact_id
from protocol.chunks import CHUNK_BYTES, check_chunk, chunk_hash
from protocol.errors import MalformedMessage
from protocol.events import EventLog
from protocol.link import DeviceLink, Incoming
from protocol.messages import ArtifactFile, ArtifactManifest, Job
from protocol.topics import Match

AGAIN_TICKS = 60
"""After so many of the agent's ticks without a chunk it is asked for again: it was a bad one."""
WINDOW = 16
"""Chunks that are asked for at once: 2 MiB."""


class ArtifactFetch:
    """Fetch a job's artifact set over a device's link, into onnx/<its id> of the cache.

    `may` says whether the owner lets it transfer now; it is asked before each window of chunks.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        link: DeviceLink,
        events: EventLog,
        may: Callable[[], bool],
    ) -> None:
        self.folder: Path | None = None
        """Where the set is, once it is whole."""
        self.manifest: ArtifactManifest | None = None
        self._job, self._device, self._state = job, settings.name, settings.state
        self._cache = settings.cache / CACHED_SETS
        self._link, self._events, self._may = link, events, may
        self._topic = topics.topic("onnx_manifest", job=job.job)
        self._asked: list[str] = []
        """Topics of chunks that are subscribed to."""
        self._waiting: dict[int, bytes] = {}
        """Chunks of the file at hand that came before the ones before them."""
        self._counts: dict[str, int] = {}
        """File → chunks of it that are on disk."""
        self._ticks = 0
        """For how long nothing of it has come, in the agent's ticks."""

    def begin(self) -> None:
        """Ask for the manifest; what is asked for comes to `take`."""
        self._link.subscribe([self._topic])

    def take(self, found: Match, incoming: Incoming) -> None:
        """Take the manifest or a chunk, and ask for what is next.

        Raises:
            ProtocolError: it is not what it should be; a good one may still come.
            ModelError: the set is of another base than the job's.
            StorageError: it can't be kept.
        """
        if found.kind == "onnx_manifest":
            self._on_manifest(open_trusted(incoming, ArtifactManifest, self._state))
        elif self._file is not None and incoming.topic in self._asked:
            self._on_chunk(self._file, int(found.fields["index"]), incoming.payload)

    def go_on(self) -> None:
        """Ask for the next chunks if the owner lets it, or again for those that do not come."""
        if self.manifest is None or self.folder is not None or not self._may():
            return
        if self._asked:
            self._ticks += 1
            if self._ticks % AGAIN_TICKS == 0:
                self._link.show_again(self._asked)
            return
        if (file := self._file) is None:
            self._finish(self.manifest)
            return
        first, info = self._counts[file], self.manifest.files[file]
        place = {"job": self._job.job, "artifact": self.manifest.artifact, "file": file}
        last = min(first // WINDOW * WINDOW + WINDOW, len(info.chunks))
        self._asked = [topics.topic("onnx_chunk", **place, index=i) for i in range(first, last)]
        self._ticks = 0
        self._link.subscribe(self._asked)

    # -- private ---------------------------------------------------------------------------------

    @property
    def _file(self) -> str | None:
        """The first file that is not whole; None: all are, or there is no manifest yet."""
        if self.manifest is None:
            return None
        files = self.manifest.files.items()
        return next((n for n, info in files if self._counts[n] < len(info.chunks)), None)

    @property
    def _partial(self) -> Path:
        assert self.manifest is not None
        return self._cache / f"{self.manifest.artifact}.{self._device}.part"

    def _on_manifest(self, manifest: ArtifactManifest) -> None:
        if self.folder is not None or manifest == self.manifest:
            return
        if manifest.job != self._job.job:
            raise MalformedMessage(self._topic, f"it is of job {manifest.job!r}")
        if manifest.base_sha256 != self._job.base.sha256:
            raise ModelError(
                f"job {self._job.job!r} offers an artifact set of another base (hash "
                f"{manifest.base_sha256[:12]}…) than its own {self._job.base.name!r} (hash "
                f"{self._job.base.sha256[:12]}…): its operator is to export that one"
            )
        self._forget_chunks()
        for old in self._cache.glob(f"*.{self._device}.part"):
            if old.name.partition(".")[0] != manifest.artifact:
                shutil.rmtree(old, ignore_errors=True)
        self.manifest = manifest
        there = self._cache / manifest.artifact
        if there.is_dir() and _is_whole(there, manifest):
            self.folder = there
            return
        with keeping("an artifact set", self._cache, "--cache"):
            self._partial.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(self._cache).free
            self._counts = {n: _good(self._partial / n, info) for n, info in manifest.files.items()}
        here = sum(self._counts.values()) * CHUNK_BYTES
        if room < manifest.bytes - here:
            raise ModelError(
                f"the artifact set of job {self._job.job!r} has {manifest.bytes / 2**20:.0f} MiB, "
                f"and {self._cache} has {room / 2**20:.0f} MiB free: free some space, or name "
                "another folder with --cache"
            )
        self._tell("fetching")
        self.go_on()

    def _on_chunk(self, file: str, index: int, chunk: bytes) -> None:
        assert self.manifest is not None
        info = self.manifest.files[file]
        check_chunk(index, chunk, info.chunks, info.chunk_bytes, info.bytes)
        self._ticks = 0
        if index < self._counts[file]:
            return
        self._waiting[index] = chunk
        with (
            keeping("an artifact set", self._cache, "--cache"),
            (self._partial / file).open("ab") as out,
        ):
            while (ready := self._waiting.pop(self._counts[file], None)) is not None:
                out.write(ready)
                self._counts[file] += 1
        if self._counts[file] % WINDOW == 0 or self._counts[file] == len(info.chunks):
            self._forget_chunks()
            self.go_on()

    def _forget_chunks(self) -> None:
        self._link.unsubscribe(self._asked)
        self._asked, self._waiting = [], {}

    def _finish(self, manifest: ArtifactManifest) -> None:
        """Check all that is there, and give it its place in the cache.

        Raises:
            ModelError: it is not what its manifest says, and is thrown away.
        """
        if not _is_whole(self._partial, manifest):
            shutil.rmtree(self._partial, ignore_errors=True)
            raise ModelError(
                f"the artifact set of job {self._job.job!r} is not what its manifest.json says: "
                "its operator is to export it anew"
            )
        there = self._cache / manifest.artifact
        with keeping("an artifact set", self._cache, "--cache"):
            if there.is_dir() and not _is_whole(there, manifest):  # any more
                shutil.rmtree(there, ignore_errors=True)
            try:
                self._partial.rename(there)
            except OSError:
                # Another device that shares the cache was faster, and trains from its own.
                if not _is_whole(there, manifest):
                    raise
                shutil.rmtree(self._partial, ignore_errors=True)
        self._link.unsubscribe([self._topic])
        self.folder = there
        self._tell("fetched")

    def _tell(self, state: str) -> None:
        assert self.manifest is not None
        here = sum(self._counts.values())
        self._events.emit(
            "onnx",
            state=state,
            artifact=self.manifest.artifact,
            bytes=self.manifest.bytes,
            there=min(here * CHUNK_BYTES, self.manifest.bytes),
        )


def _is_whole(folder: Path, manifest: ArtifactManifest) -> bool:
    """Say whether a folder is the set that a manifest announces: to its last byte, by hashes."""
    try:
        if artifact_id((folder / MANIFEST).read_bytes()) != manifest.artifact:
            return False
        return check_artifact(folder).base_sha256 == manifest.base_sha256
    except (OSError, ModelError):
        return False


def _good(path: Path, info: ArtifactFile) -> int:
    """Return how many chunks a file begins with, and cut off the rest.

    Hashes say so: after a power cut a file may be longer than what was written of it.
    """
    if not path.exists():
        return 0
    good = 0
    with path.open("rb+") as file:
        for expected in info.chunks:
            chunk = file.read(info.chunk_bytes)
            if chunk_hash(chunk) != expected:
                break
            good += 1
        file.truncate(min(good * info.chunk_bytes, info.bytes))
    return good
