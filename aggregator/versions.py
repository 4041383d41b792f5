"""Versions of the shared adapter: written as one file for each rank band, read back as published.

What a version *is* are the bytes that devices download: it is decoded from them here too, so that
both sides start a round from the same numbers however they were rounded.
"""

from __future__ import annotations

from functools import lru_cache

from aggregator.store import Store
from protocol.adapter import Adapter, initial_adapter
from protocol.bands import Band, band_ranks, bands, cut, join, read_adapter, to_tensors
from protocol.files import write_durably
from protocol.messages import FileInfo, GlobalManifest, Job, describe_file
from protocol.tensors import encode


def first_version(job: Job) -> Adapter:
    """Return version 1: a product of zero."""
    return initial_adapter(job.base.modules, job.rank, job.scale, job.seed)


def write_version(
    job: Job, store: Store, adapter: Adapter, *, version: int, parent: int | None
) -> GlobalManifest:
    """Write a version's bands and return its manifest; committing it is the caller's."""
    files: dict[str, FileInfo] = {}
    for band in bands(job.ladder):
        tensors = to_tensors(cut(adapter, band))
        data = encode(tensors, job.encoding_down)
        write_durably(store.band_file(version, band.name), data)
        files[band.name] = describe_file(data)
    return GlobalManifest(
        job=job.job, version=version, parent=parent, encoding=job.encoding_down, bands=files
    )


def load_version(job: Job, store: Store, version: int) -> Adapter:
    """Return a version as devices decode it."""
    return _load(job.model_dump_json(), store, version)


@lru_cache(maxsize=2)
def _load(job_json: str, store: Store, version: int) -> Adapter:
    job = Job.model_validate_json(job_json)
    shapes, parts = job.base.modules, dict[Band, Adapter]()
    for band in bands(job.ladder):
        data = store.band_file(version, band.name).read_bytes()
        ranks = band_ranks(shapes, band)
        parts[band] = read_adapter(data, shapes, ranks, job.scale, job.encoding_down)
    return join(parts, job.scale)
