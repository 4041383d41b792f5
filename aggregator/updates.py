"""What the bytes of an upload say: the factors that a device trained, and its answer to a probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aggregator.merge import Update
from aggregator.merge.lowrank import gram
from aggregator.versions import Versions
from protocol.adapter import Adapter, Factors, LazyLayers, add, module_directions, select
from protocol.bands import Stack, read_adapter, stacks, stored_layers
from protocol.factors import trained_factors
from protocol.layers import from_bitmap, only
from protocol.messages import Job, UploadManifest
from protocol.notify import alive
from protocol.probe import TopLogits, decode_probe


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


def read_update(job: Job, versions: Versions, manifest: UploadManifest, data: bytes) -> Update:
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


def update_norm(versions: Versions, manifest: UploadManifest, update: Update) -> float:
    """Return ‖s·(B'A' − BA)‖_F over all modules: by how much an update moves the product."""
    before = select(versions.base(manifest), update.directions)
    products = gram([update.adapter, before])
    return float(np.sqrt(max(0.0, products[0, 0] + products[1, 1] - 2 * products[0, 1])))


def factor_norm(update: Update) -> float:
    """Return the larger of ‖A'‖_F and ‖s·B'‖_F over all modules.

    A factor of zeros hides the other from the product, and not from a factor average.
    """
    layers = update.adapter.layers.values()
    a = np.linalg.norm([np.linalg.norm(f.a.astype(np.float64)) for f in layers])
    b = np.linalg.norm([np.linalg.norm(f.b.astype(np.float64)) for f in layers])
    return float(max(a, update.adapter.scale * b))
