"""An adapter on its way to this device: where it is published, which bands, which chunks are in.

Bookkeeping only; the agent feeds it messages (`fetch`). An adapter is handed out when it is
complete and every hash, name, shape and value has been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from protocol import topics
from protocol.adapter import Adapter
from protocol.bands import Band, affordable, band_ranks, bands, covering, join, read_adapter
from protocol.chunks import assemble, check_chunk
from protocol.errors import MalformedMessage
from protocol.faults import fault_point
from protocol.messages import GlobalManifest, Job
from protocol.tensors import bytes_each


def wanted_bands(job: Job, *, rank: int, held: int, byte_budget: float) -> list[Band]:
    """Return the bands a device downloads.

    With the remainder dropped: those of its rank. With it frozen: as many as its memory holds
    (`held`) and its link affords (`byte_budget` a version), never fewer than its rank needs.
    """
    if job.remainder == "dropped":
        return covering(job.ladder, rank)
    affords = affordable(
        job.base.modules,
        job.ladder,
        rank=rank,
        byte_budget=byte_budget,
        bytes_each=bytes_each(job.encoding_down),
    )
    return [band for band in affords if band.start < max(held, rank)]


class Source(NamedTuple):
    """Say which of a job's adapters is meant, as a device with this name sees them."""

    job: str
    device: str
    kind: Literal["global", "personal", "trial", "candidate"]
    version: int
    number: int = 0
    """Of a candidate."""

    def __str__(self) -> str:
        what = {
            "global": "the common adapter",
            "personal": "its own adapter",
            "trial": "the trial",
            "candidate": f"candidate {self.number}",
        }[self.kind]
        return f"{what} of version {self.version}"

    @property
    def is_tried(self) -> bool:
        """Whether it is given to be tried, and not to be gone on with."""
        return self.kind in ("trial", "candidate")

    @property
    def manifest_topic(self) -> str:
        return topics.topic(f"{self.kind}_manifest", **self._levels)

    def chunk_topics(self, wanted: Sequence[Band]) -> list[str]:
        """Return the topic filters of some bands' chunks."""
        kind = f"{self.kind}_chunk"
        return [topics.subscription(kind, **self._levels, band=band.name) for band in wanted]

    def has(self, found: topics.Match) -> bool:
        """Say whether a topic is its manifest's or one of its chunks'."""
        if found.kind not in (f"{self.kind}_manifest", f"{self.kind}_chunk"):
            return False
        return all(found.fields.get(name, value) == value for name, value in self._levels.items())

    @property
    def _levels(self) -> dict[str, str]:
        numbers = {"version": str(self.version), "number": str(self.number)}
        return {"job": self.job, "device": self.device, **numbers}


class Download:
    """Collect the chunks of the wanted bands of one adapter."""

    def __init__(self, job: Job, manifest: GlobalManifest, wanted: Sequence[Band]) -> None:
        names = [band.name for band in bands(job.ladder)]
        if manifest.job != job.job or list(manifest.bands) != names:
            raise MalformedMessage(
                f"version {manifest.version}", "its bands are not those of the job's ladder"
            )
        self.job = job
        self.manifest = manifest
        self.wanted = list(wanted)
        self._chunks: dict[Band, dict[int, bytes]] = {band: {} for band in wanted}

    @property
    def complete(self) -> bool:
        return self.outstanding == 0

    @property
    def outstanding(self) -> int:
        """How many chunks are to come yet."""
        bands = self.manifest.bands
        return sum(len(bands[b.name].chunks) - len(self._chunks[b]) for b in self.wanted)

    @property
    def held(self) -> int:
        """Return how many directions the device will have."""
        return self.wanted[-1].stop

    def add(self, band: Band, index: int, chunk: bytes) -> None:
        """Take a chunk; one of a band that is not wanted is ignored.

        Raises:
            BadChunk: its index, length or hash is not in the manifest.
        """
        if band not in self._chunks:
            return
        info = self.manifest.bands[band.name]
        check_chunk(index, chunk, info.chunks, info.chunk_bytes, info.bytes)
        self._chunks[band][index] = chunk

    def adapter(self) -> Adapter:
        """Return the downloaded directions.

        Raises:
            BadChunk: a band as a whole does not have its announced hash.
            BadTensors: a band's tensors are not those of the job.
        """
        fault_point("device.version.downloaded")
        parts: dict[Band, Adapter] = {}
        for band in self.wanted:
            info = self.manifest.bands[band.name]
            chunks = self._chunks[band]
            data = assemble((chunks[i] for i in sorted(chunks)), info.bytes, info.sha256)
            shapes = self.job.base.modules
            parts[band] = read_adapter(
                data, shapes, band_ranks(shapes, band), self.job.scale, self.manifest.encoding
            )
        fault_point("device.version.checked")
        return join(parts, self.job.scale)
