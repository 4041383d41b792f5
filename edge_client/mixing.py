"""An adapter of the device's own beside the shared one: trained here, kept here, mixed at use.

ΔW = ΔW_shared + λ·ΔW_private, with one λ for the device, chosen on text that neither was trained on
nor is reported on. λ = 0 is among the choices: what does not help is left out. Source: the dual
adapters of FedDPA, arXiv 2403.19211, which weighs them for each instance by its likeness to the
device's own text; ours is one weight.
"""

from __future__ import annotations

import hashlib

import numpy as np

from protocol.adapter import Adapter, Factors, initial_adapter
from protocol.messages import Job

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Choices of λ, least first: of equal losses the smallest is taken."""


def first_private(job: Job, device: str, rank: int) -> Adapter:
    """Draw a private adapter of `rank` whose product is zero: other directions than the shared."""
    digest = hashlib.sha256(f"{job.seed}|{device}|private".encode()).digest()
    seed = int.from_bytes(digest[:6], "big")
    return initial_adapter(job.base.modules, rank, job.scale, seed)


def stacked(shared: Adapter, private: Adapter, weight: float) -> Adapter:
    """Return ΔW_shared + weight·ΔW_private as one adapter of the sum of both ranks (exact)."""
    if not weight:
        return shared
    ratio = np.float32(weight * private.scale / shared.scale)
    return Adapter(
        {
            name: Factors(
                np.concatenate([f.a, private.layers[name].a]),
                np.concatenate([f.b, ratio * private.layers[name].b], axis=1),
            )
            for name, f in shared.layers.items()
        },
        shared.scale,
    )
