"""Adapters that are given out: written as one file for each rank band, read back as published.

What a version *is* are the bytes that devices download: it is decoded from them here too, so that
both sides start a round from the same numbers however they were rounded.
"""

from __future__ import annotations

from aggregator.places import Place, common
from aggregator.store import Store
from protocol.adapter import Adapter, initial_adapter
from protocol.bands import Band, band_ranks, bands, cut, join, read_adapter, to_tensors
from protocol.files import write_durably
from protocol.messages import FileInfo, GlobalManifest, Job, UploadManifest, describe_file
from protocol.tensors import encode


def first_version(job: Job) -> Adapter:
    """Return version 1: a product of zero."""
    return initial_adapter(job.base.modules, job.rank, job.scale, job.seed)


class Versions:
    """Write and read the adapters of one job.

    The common version read last is kept in memory, and the device's own one: every upload of a
    round is compared with one of them, twice.
    """

    def __init__(self, job: Job, store: Store) -> None:
        self._job = job
        self._store = store
        self._last: dict[bool, tuple[Place, Adapter]] = {}
        """Whether it is the common one → what was read last."""

    def write(self, adapter: Adapter, *, version: int, parent: int | None) -> GlobalManifest:
        """Write a common version's bands and return its manifest; committing is the caller's."""
        return self.write_at(common(version), adapter, parent)

    def write_at(self, place: Place, adapter: Adapter, parent: int | None) -> GlobalManifest:
        """Write an adapter's bands and return its manifest; committing it is the caller's."""
        self._last.clear()
        files: dict[str, FileInfo] = {}
        for band in bands(self._job.ladder):
            data = encode(to_tensors(cut(adapter, band)), self._job.encoding_down)
            with self._store.on_disk():
                write_durably(self._store.band_file(place, band.name), data)
            files[band.name] = describe_file(data)
        return GlobalManifest(
            job=self._job.job,
            version=place.version,
            parent=parent,
            encoding=self._job.encoding_down,
            bands=files,
        )

    def load(self, version: int) -> Adapter:
        """Return a common version as devices decode it."""
        return self.load_at(common(version))

    def load_at(self, place: Place) -> Adapter:
        """Return an adapter as devices decode it."""
        shared = place.kind == "global"
        known = self._last.get(shared)
        if known is None or known[0] != place:
            known = self._last[shared] = place, self._read(place)
        return known[1]

    def base(self, manifest: UploadManifest) -> Adapter:
        """Return what an update starts from: the device's own adapter if it has one."""
        if manifest.personal is None:
            return self.load(manifest.version)
        return self.load_at(Place("personal", manifest.personal, manifest.device))

    def _read(self, place: Place) -> Adapter:
        shapes, scale = self._job.base.modules, self._job.scale
        parts: dict[Band, Adapter] = {}
        for band in bands(self._job.ladder):
            data = self._store.band_file(place, band.name).read_bytes()
            ranks = band_ranks(shapes, band)
            parts[band] = read_adapter(data, shapes, ranks, scale, self._job.encoding_down)
        found = join(parts, scale)
        for factors in found.layers.values():  # kept, so that nobody may write into it: no rule
            factors.a.setflags(write=False)
            factors.b.setflags(write=False)
        return found
