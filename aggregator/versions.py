"""Versions of the shared adapter: written as one file for each rank band, read back as published.

What a version *is* are the bytes that devices download: it is decoded from them here too, so that
both sides start a round from the same numbers however they were rounded.
"""

from __future__ import annotations

from aggregator.store import Store
from protocol.adapter import Adapter, initial_adapter
from protocol.bands import Band, band_ranks, bands, cut, join, read_adapter, to_tensors
from protocol.files import write_durably
from protocol.messages import FileInfo, GlobalManifest, Job, describe_file
from protocol.tensors import encode


def first_version(job: Job) -> Adapter:
    """Return version 1: a product of zero."""
    return initial_adapter(job.base.modules, job.rank, job.scale, job.seed)


class Versions:
    """Write and read the versions of one job.

    The version read last is kept in memory: every upload of a round is compared with the one that
    the round started from.
    """

    def __init__(self, job: Job, store: Store) -> None:
        self._job = job
        self._store = store
        self._last: tuple[int, Adapter] | None = None

    def write(self, adapter: Adapter, *, version: int, parent: int | None) -> GlobalManifest:
        """Write a version's bands and return its manifest; committing it is the caller's."""
        self._last = None
        files: dict[str, FileInfo] = {}
        for band in bands(self._job.ladder):
            data = encode(to_tensors(cut(adapter, band)), self._job.encoding_down)
            with self._store.on_disk():
                write_durably(self._store.band_file(version, band.name), data)
            files[band.name] = describe_file(data)
        return GlobalManifest(
            job=self._job.job,
            version=version,
            parent=parent,
            encoding=self._job.encoding_down,
            bands=files,
        )

    def load(self, version: int) -> Adapter:
        """Return a version as devices decode it."""
        if self._last is None or self._last[0] != version:
            self._last = version, self._read(version)
        return self._last[1]

    def _read(self, version: int) -> Adapter:
        shapes, scale = self._job.base.modules, self._job.scale
        parts: dict[Band, Adapter] = {}
        for band in bands(self._job.ladder):
            data = self._store.band_file(version, band.name).read_bytes()
            ranks = band_ranks(shapes, band)
            parts[band] = read_adapter(data, shapes, ranks, scale, self._job.encoding_down)
        return join(parts, scale)
