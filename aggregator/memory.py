"""What a rule carries from round to round, on disk: one file for each sum, named by its version.

A file is written before the transaction that names it, and every merge reads what the last one
committed: a crash in between changes nothing in what is merged.
"""

from __future__ import annotations

import safetensors.numpy

from aggregator.errors import StoreError
from aggregator.merge import Memory
from aggregator.store import CarriedFile, Store
from protocol.adapter import Adapter, Factors
from protocol.chunks import file_hash
from protocol.files import write_durably
from protocol.tensors import encode

SUMS = ("momentum", "residue")


def write_memory(store: Store, memory: Memory, *, version: int) -> dict[str, CarriedFile]:
    """Write what was handed on with a version; committing the result is the caller's."""
    written = {}
    for kind in SUMS:
        adapter: Adapter | None = getattr(memory, kind)
        if adapter is None:
            continue
        tensors = {f"A.{name}": f.a for name, f in adapter.layers.items()}
        tensors |= {f"B.{name}": f.b for name, f in adapter.layers.items()}
        data = encode(tensors, "f32")
        carried = CarriedFile(f"{version}.{kind}.safetensors", file_hash(data), adapter.scale)
        with store.on_disk():
            write_durably(store.memory_folder / carried.name, data)
        written[kind] = carried
    return written


def read_memory(store: Store) -> Memory:
    """Return what the last merge handed on.

    Raises:
        StoreError: a file of it is gone or damaged.
    """
    return Memory(**{kind: _read(store, carried) for kind, carried in store.carried().items()})


def _read(store: Store, carried: CarriedFile) -> Adapter:
    path = store.memory_folder / carried.name
    data = path.read_bytes() if path.is_file() else b""
    if file_hash(data) != carried.sha256:
        raise StoreError(
            f"{path}, which the next round needs, is gone or damaged; bring the state folder back "
            "from a backup, or begin anew with another --state folder and job name"
        )
    tensors = safetensors.numpy.load(data)
    modules = [name[2:] for name in tensors if name.startswith("A.")]
    layers = {name: Factors(tensors[f"A.{name}"], tensors[f"B.{name}"]) for name in modules}
    return Adapter(layers, carried.scale)
