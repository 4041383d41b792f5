"""Shares that go by what devices tell of their training: the metrics of `protocol.metrics`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregator.merge.round_view import RoundView
from aggregator.merge.sums import Float64Array
from aggregator.merge.weighting import equal_share, sample_share
from protocol.metrics import LOSS_AFTER, LOSS_BEFORE, TOKEN_BUCKETS, wrong_metric


class NotTold(Exception):
    """A device did not send what a share goes by; says which device, and what."""


def loss_reduction_share(view: RoundView) -> Float64Array:
    """Return p_k ∝ how far the training loss of device k went down; a rise counts 0.

    Equal shares if nobody's went down. Source: Lorar.

    Raises:
        NotTold: a device did not send both losses, or none that can be.
    """
    losses = _told(view, (LOSS_BEFORE, LOSS_AFTER))
    reduction = np.maximum(losses[:, 0] - losses[:, 1], 0.0)
    return reduction / reduction.sum() if reduction.any() else equal_share(view)


def discrepancy_share(view: RoundView, slope: float, offset: float) -> Float64Array:
    """Return p_k ∝ max(0, n_k/Σn − slope·d_k + offset), d_k = ‖h_k − h‖₂.

    h_k is the token histogram of device k as parts of 1, h = Σ(n_k/Σn)·h_k the fleet's. Sample
    shares if that leaves nobody. Source: FedDisco, arXiv 2305.19229, there for classes.

    Raises:
        NotTold: a device did not send a histogram, or none that can be.
        MergeError: no device has an example.
    """
    histograms = _told(view, TOKEN_BUCKETS)
    for update, row in zip(view.updates, histograms, strict=True):
        if not row.any():
            raise NotTold(f"device {update.device} sent a token histogram that is none")
    histograms = histograms / histograms.sum(axis=1, keepdims=True)
    samples = sample_share(view)
    distance = np.linalg.norm(histograms - samples @ histograms, axis=1)
    shares = np.maximum(samples - slope * distance + offset, 0.0)
    return shares / shares.sum() if shares.any() else samples


def _told(view: RoundView, names: Sequence[str]) -> Float64Array:
    """Return metrics (K, names) of all devices."""
    for update in view.updates:
        for name in names:
            if not np.isfinite(update.metrics.get(name, np.nan)):
                raise NotTold(f"device {update.device} did not send the metric {name}")
        if why := wrong_metric(update.metrics):
            raise NotTold(f"device {update.device}: {why}")
    return np.array([[update.metrics[name] for name in names] for update in view.updates])
