"""A described base and a pool of made updates: what replays of tests need, in milliseconds.

The constants of the memory model are those that were measured of base-tiny on a laptop's processor.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

import base_tiny
from device_profiles.virtual.pool import (
    FILE,
    FORMAT,
    CalibrationRecord,
    PoolRecord,
    UpdateRecord,
    WayRecord,
)
from protocol.adapter import Adapter, Factors, module_rank
from protocol.bands import to_tensors
from protocol.messages import BaseModelInfo
from protocol.tensors import encode

LADDER = [2, 4, 8]
SCALE = 2.0


def described_base(folder: Path) -> Path:
    """Write a description of base-tiny's shapes, and return its file."""
    with (base_tiny.PATH / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    modules = {
        name.removesuffix(".weight"): tuple(entry["shape"])
        for name, entry in header.items()
        if name.endswith("_proj.weight")
    }
    base = BaseModelInfo(name="made", sha256="a" * 64, parameters=2_828_800, modules=modules)
    path = folder / "model.json"
    path.write_text(base.model_dump_json())
    return path


def made_pool(folder: Path, base: BaseModelInfo) -> Path:
    """Write a pool of small random updates, the same each time."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    updates = []

    def normal(*shape: int) -> np.ndarray:
        return (1e-3 * draw.standard_normal(shape)).astype(np.float32)

    for rank in LADDER:
        layers = {}
        for name, shape in base.modules.items():
            own = module_rank(shape, rank)
            layers[name] = Factors(normal(own, shape[1]), normal(shape[0], own))
        data = encode(to_tensors(Adapter(layers, SCALE)), "f32")
        (folder / f"rank-{rank}.safetensors").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        updates.append(UpdateRecord(rank=rank, tokens=1477, loss=2.71, rows=6, sha256=sha256))
    ways = [
        WayRecord(
            dtype="f32", checkpointing=True, fixed_mib=2.4, token_mib=0.0225, tokens_s=1990,
            least_mib=3.3, probed_tokens=512, probed=((64, 3.3), (256, 8.2), (512, 13.9)),
        ),
        WayRecord(
            dtype="f32", checkpointing=False, fixed_mib=1.9, token_mib=0.0637, tokens_s=2780,
            least_mib=5.8, probed_tokens=512, probed=((64, 5.8), (256, 18.2), (512, 34.5)),
        ),
        WayRecord(
            dtype="bf16", checkpointing=True, fixed_mib=14.0, token_mib=0.0, tokens_s=1438,
            least_mib=9.8, probed_tokens=512, probed=((64, 9.8), (256, 14.2), (512, 14.0)),
        ),
    ]  # fmt: skip
    constants = CalibrationRecord(
        floor_mib=414.0,
        weights_mib={"f32": 12.0, "bf16": 17.8},
        counted_mib={"f32": 10.8, "bf16": 5.4},
        ways=ways,
    )
    record = PoolRecord(
        format=FORMAT,
        base_sha256=base.sha256,
        base_loss=2.67,
        train_tokens=134_002,
        held_out_tokens=19_210,
        constants=constants,
        updates=updates,
    )
    (folder / FILE).write_text(record.model_dump_json())
    return folder
