"""What the bytes of an upload say: the factors that a device trained, and its answer to a probe."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from aggregator.merge import Update
from aggregator.merge.round_view import change_norm
from aggregator.personal.refusals import probe_limit
from aggregator.versions import Versions
from protocol.adapter import Adapter, Factors, LazyLayers, add, module_directions, select
from protocol.bands import Stack, read_adapter, stacks, stored_layers
from protocol.errors import BadTensors, ProtocolError
from protocol.factors import trained_factors
from protocol.layers import from_bitmap, only
from protocol.messages import Job, Limits, UploadManifest
from protocol.metrics import wrong_metric
from protocol.notify import alive
from protocol.probe import TopLogits, decode_probe
from protocol.tensors import HEADER_LIMIT_BYTES, tensor_bytes


class Bases(Protocol):
    """Know what updates start from."""

    def base(self, manifest: UploadManifest) -> Adapter: ...


class Verified(NamedTuple):
    """Say what is wrong with a complete upload, if anything, and by how much it moves."""

    wrong: str
    change: float = 0.0


def verify(job: Job, bases: Bases, manifest: UploadManifest, data: bytes) -> Verified:
    """Look at all that a complete upload says: tensors, the answer to a probe, and norms."""
    try:
        update = read_update(job, bases, manifest, data)
        read_probe(job, manifest, data)
    except BadTensors as error:
        return Verified(str(error))
    change, factors = change_norm(update, bases.base(manifest)), factor_norm(update)
    return Verified(_too_large(job.limits, change, factors), change)


def _too_large(limits: Limits, change: float, factors: float) -> str:
    """Say which of a job's limits is exceeded; empty if none is."""
    if not change <= limits.update_norm:
        moves = f"it moves the scaled product by {change:.3g}"
        return f"{moves}, over limits.update_norm = {limits.update_norm:g}"
    if not factors <= limits.factor_norm:
        large = f"its factors are as large as {factors:.3g}"
        return f"{large}, over limits.factor_norm = {limits.factor_norm:g}"
    return ""


def unfit(job: Job, manifest: UploadManifest) -> str:
    """Say what is wrong with an upload, from its manifest alone; empty if nothing is."""
    if manifest.held > job.rank:
        return f"it claims {manifest.held} directions, the shared adapter has {job.rank}"
    if manifest.encoding != job.encoding_up:
        return f"its encoding is {manifest.encoding}, the job's {job.encoding_up}"
    if why := wrong_metric(manifest.metrics) or _unfit_modules(job, manifest):
        return why
    if manifest.file.bytes > largest_upload(job, manifest):
        return f"{manifest.file.bytes} bytes are more than its rank {manifest.rank} takes"
    return ""


def _unfit_modules(job: Job, manifest: UploadManifest) -> str:
    """Say what is wrong with the modules that an upload claims; empty if nothing is."""
    if manifest.modules is None:
        return ""
    if job.layers == "all":
        return "it has some modules only, this job trains all"
    try:
        from_bitmap(job.base.modules, manifest.modules)
    except ProtocolError as error:
        return str(error)
    return ""


def largest_upload(job: Job, manifest: UploadManifest) -> int:
    """Return the bytes that an upload of this rank can have."""
    shapes = {s.name: s.shape for s in upload_stacks(job, manifest)}
    largest = tensor_bytes(shapes, manifest.encoding) + HEADER_LIMIT_BYTES
    return min(largest + probe_limit(job.probe), job.limits.upload_bytes)


def upload_stacks(job: Job, manifest: UploadManifest) -> list[Stack]:
    """Return the tensors that an upload must have."""
    ranks = {name: len(at) for name, at in upload_directions(job, manifest).items()}
    return stacks(job.base.modules, ranks, trained_factors(job.training.factors, manifest.round))


def upload_directions(job: Job, manifest: UploadManifest) -> dict[str, np.ndarray]:
    """Return which directions of each module an upload changes; its `modules` are checked."""
    chosen = module_directions(
        job.base.modules,
        job.directions,
        job=job.job,
        device=manifest.device,
        round_number=manifest.round,
        rank_trained=manifest.rank_trained,
        held=manifest.held,
        rank=manifest.rank,
    )
    if manifest.modules is None:
        return chosen
    return only(chosen, from_bitmap(job.base.modules, manifest.modules))


def read_update(job: Job, versions: Bases, manifest: UploadManifest, data: bytes) -> Update:
    """Return what an upload's bytes say: absolute factors of the directions it trained.

    A factor that the round does not train is the one of the adapter that it started from.

    Raises:
        BadTensors: they are not what the manifest and the job imply.
    """
    chosen = upload_directions(job, manifest)
    ranks = {name: len(at) for name, at in chosen.items()}
    data = data[: len(data) - manifest.probe_bytes]
    trained = trained_factors(job.training.factors, manifest.round)
    change = read_adapter(data, job.base.modules, ranks, job.scale, manifest.encoding, trained)
    before = select(versions.base(manifest), chosen)
    return Update(manifest.device, add(before, change), chosen, manifest.examples, manifest.metrics)


def stored_update(job: Job, versions: Versions, manifest: UploadManifest, path: Path) -> Update:
    """Return what `read_update` has taken from a file; factors are read when they are asked for.

    Raises:
        BadTensors: the file is not what it was when it was counted.
        OSError: it can't be read; so when a module is.
    """
    chosen = upload_directions(job, manifest)
    ranks = {name: len(at) for name, at in chosen.items()}
    size = manifest.file.bytes - manifest.probe_bytes
    trained = trained_factors(job.training.factors, manifest.round)
    changes = stored_layers(path, size, job.base.modules, ranks, manifest.encoding, trained)
    before = versions.base(manifest).layers

    def after(module: str) -> Factors:
        alive()  # a merge asks for a module of an update at a time
        own, change = before[module].take(chosen[module]), changes[module]
        return Factors(own.a + change.a, own.b + change.b)

    adapter = Adapter(LazyLayers(tuple(changes), after), job.scale)
    return Update(manifest.device, adapter, chosen, manifest.examples, manifest.metrics)


def read_probe(job: Job, manifest: UploadManifest, data: bytes) -> TopLogits | None:
    """Return an upload's answer to the job's probe, if it brings one.

    Raises:
        BadTensors: the bytes are no such answer.
    """
    if not manifest.probe_bytes or job.probe is None:
        return None
    return decode_probe(data[len(data) - manifest.probe_bytes :], job.probe)


def factor_norm(update: Update) -> float:
    """Return the larger of ‖A'‖_F and ‖s·B'‖_F over all modules.

    A factor of zeros hides the other from the product, and not from a factor average.
    """
    layers = update.adapter.layers.values()
    a = np.linalg.norm([np.linalg.norm(f.a.astype(np.float64)) for f in layers])
    b = np.linalg.norm([np.linalg.norm(f.b.astype(np.float64)) for f in layers])
    return float(max(a, update.adapter.scale * b))
