"""What a device's own training has changed in a job, summed over its rounds: kept here, never sent.

A device's change counts in an adapter for what its weight among the devices is. In the end, when
nobody trains on, the device adds some more of what it has changed itself:

    ΔW = ΔW_kept + share · Σ_t (ΔW_trained,t − ΔW_received,t)

The sum is one of products, for factors of different rounds lie in different bases. It costs no step
and no byte. What a round has changed is noisy, what all have is less so: the sum of all rounds did
better than that of the last ones (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_client.learning import Learned
from edge_client.numbered import NumberedAdapter
from protocol.adapter import Adapter, Factors, add, module_rank, select
from protocol.messages import Job

FOLDER = "own-changes"
SHARES = (0.025, 0.05, 0.1, 0.2, 0.4)
"""Choices of the share, least first; nothing is the one before them."""


class OwnChanges:
    """Keep the sum for one job in `state`, at the shared rank, each round in it once.

    Raises, as every method does:
        StorageError: it can't be kept, or what was kept is damaged.
    """

    def __init__(self, job: Job, state: Path) -> None:
        self._job = job
        self._kept = NumberedAdapter(
            job,
            job.rank,
            state,
            folder=FOLDER,
            what="the sum of this device's own changes",
            counts="round",
        )

    def note(self, round_number: int, held: Adapter, learned: Learned) -> None:
        """Add what a round has changed of the adapter that was `held`; again, in its place."""
        made_of = self._kept.newest(below=round_number)
        received = select(held, learned.directions)
        total = summed(
            None if made_of is None else self._kept.read(made_of),
            add(received, learned.change),
            received,
            self._job,
        )
        self._kept.keep(round_number, total, made_of=made_of)

    def total(self) -> Adapter | None:
        """Return the sum of all rounds so far; None if there was none."""
        newest = self._kept.newest()
        return None if newest is None else self._kept.read(newest)


def summed(total: Adapter | None, after: Adapter, before: Adapter, job: Job) -> Adapter:
    """Return the best form, at the job's rank, of ΔW_total + ΔW_after − ΔW_before."""
    parts = [(1.0, after), (-1.0, before)]
    return _cut(parts if total is None else [(1.0, total), *parts], job)


def with_share(adapter: Adapter, total: Adapter, share: float, job: Job) -> Adapter:
    """Return the best form of ΔW_adapter + share·ΔW_total at the rank that the adapter has."""
    return _cut([(1.0, adapter), (share, total)], job).truncated(adapter.rank)


def best_share(
    loss: Callable[[Adapter], float], adapter: Adapter, total: Adapter, job: Job
) -> tuple[Adapter, float]:
    """Return an adapter with that share of the sum which `loss` likes best, and the share.

    Shares are tried from the least on, until one is no better than the one before.
    """
    best, found, taken = loss(adapter), adapter, 0.0
    for share in SHARES:
        tried = with_share(adapter, total, share, job)
        result = loss(tried)
        if not result < best:  # NaN is no better either
            break
        best, found, taken = result, tried, share
    return found, taken


def _cut(parts: list[tuple[float, Adapter]], job: Job) -> Adapter:
    """Return the best form of Σ weight·ΔW at the job's rank, by QR of the stacks, √σ on both sides.

    All parts have one scale. Directions that the sum does not have are zero.
    """
    layers = {}
    for name, shape in job.base.modules.items():
        factors = [(weight, part.layers[name]) for weight, part in parts]
        a = np.concatenate([f.a for _, f in factors]).astype(np.float64)
        b = np.concatenate([weight * f.b for weight, f in factors], axis=1).astype(np.float64)
        layers[name] = _leading(a, b, module_rank(shape, job.rank))
    return Adapter(layers, job.scale)


def _leading(a: np.ndarray, b: np.ndarray, rank: int) -> Factors:
    """Return the leading directions of b·a, a (n, d_in), b (d_out, n), in float32."""
    left, core_b = np.linalg.qr(b)
    right, core_a = np.linalg.qr(a.T)
    u, sigma, vt = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
    k = min(rank, len(sigma))
    root = np.sqrt(sigma[:k])
    found_a, found_b = np.zeros((rank, a.shape[1])), np.zeros((b.shape[0], rank))
    found_a[:k] = root[:, None] * (right @ vt[:k].T).T
    found_b[:, :k] = (left @ u[:, :k]) * root
    return Factors(found_a.astype(np.float32), found_b.astype(np.float32))
