"""How far each device of a round trusts each other's adapter, by the three strategies.

Scores are (K, K), in the order of the round's updates. −inf weighs nothing: nobody has measured it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from aggregator.merge.lowrank import gram
from aggregator.merge.round_view import RoundView
from aggregator.merge.sums import Float64Array
from aggregator.merge.trust import (
    cosine_scores,
    prediction_distance,
    prediction_scores,
)
from aggregator.personal.settings import Strategy
from aggregator.personal.state import TrustState
from protocol.probe import TopLogits


def round_scores(
    strategy: Strategy, view: RoundView, state: TrustState, probes: Mapping[str, TopLogits]
) -> Float64Array:
    """Return the scores of a round's full adapters."""
    devices = [update.device for update in view.updates]
    if strategy == "trust-weights":
        return cosine_scores(gram([update.adapter for update in view.updates]))
    if strategy == "trust-validation":
        return _from_losses(devices, state)
    return _from_probes(devices, probes)


def _from_losses(devices: Sequence[str], state: TrustState) -> Float64Array:
    """Return minus the losses that are known; of itself a device thinks no worse than of others."""
    scores = np.full((len(devices), len(devices)), -np.inf)
    for i, device in enumerate(devices):
        known = state.losses.get(device, {})
        for j, other in enumerate(devices):
            if other in known:
                scores[i, j] = -known[other]
        if device not in known:
            scores[i, i] = scores[i].max()
    return scores


def _from_probes(devices: Sequence[str], probes: Mapping[str, TopLogits]) -> Float64Array:
    """Return the scores among those who sent as many positions as most; others are not known."""
    scores = np.full((len(devices), len(devices)), -np.inf)
    sent = [i for i, device in enumerate(devices) if device in probes]
    lengths = [len(probes[devices[i]].indices) for i in sent]
    usual = max(set(lengths), key=lambda n: (lengths.count(n), n), default=0)
    among = [i for i, length in zip(sent, lengths, strict=True) if length == usual]
    if among:
        distance = prediction_distance([probes[devices[i]] for i in among])
        scores[np.ix_(among, among)] = prediction_scores(distance)
    return scores
