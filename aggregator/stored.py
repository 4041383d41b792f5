"""Updates that have been counted, as a merge reads them: a module at a time, from their files."""

from __future__ import annotations

from pathlib import Path

from aggregator.intake import upload_directions
from aggregator.merge import Update
from aggregator.versions import Versions
from protocol.adapter import Adapter, Factors, LazyLayers
from protocol.bands import stored_layers
from protocol.messages import Job, UploadManifest


def stored_update(job: Job, versions: Versions, manifest: UploadManifest, path: Path) -> Update:
    """Return what `intake.read_update` does, of a file that it has taken.

    Raises:
        BadTensors: the file is not what it was when it was counted.
        OSError: it can't be read; so when a module is.
    """
    chosen = upload_directions(job, manifest)
    ranks = {name: len(at) for name, at in chosen.items()}
    changes = stored_layers(path, job.base.modules, ranks, manifest.encoding)
    before = versions.load(manifest.version).layers

    def after(module: str) -> Factors:
        own, change = before[module].take(chosen[module]), changes[module]
        return Factors(own.a + change.a, own.b + change.b)

    adapter = Adapter(LazyLayers(tuple(changes), after), job.scale)
    return Update(manifest.device, adapter, chosen, manifest.examples, manifest.metrics)
