"""A round of personal adapters: from full adapters and answers to a mixture for each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregator.merge.round_view import Merged, RoundView
from aggregator.merge.rules import RULES
from aggregator.merge.sums import Float64Array
from aggregator.merge.trust import personal, softmax_rows
from aggregator.personal.answers import Answer
from aggregator.personal.candidates import draw
from aggregator.personal.scores import round_scores
from aggregator.personal.settings import Strategy, TrustSettings
from aggregator.personal.state import TrustState
from protocol.adapter import Adapter
from protocol.probe import TopLogits

COMMON = "flexlora"
"""The common adapter: full adapters by sample share, as a product. Where all started from one
adapter it is what `anchored` gives."""


@dataclass(frozen=True, slots=True)
class PersonalRound:
    """Hold what a round with a trust strategy comes to.

    `mixtures` are the adapters of the devices that have answered; the others get `common`.
    `trials` are mixtures at another temperature, and `candidates` full adapters by the device that
    trained them, both to be tried. `rows` (K, K) are the weights, in the order of `devices`;
    devices without a mixture have the shares of `common`. `scores` (K, K) are what they came from,
    −inf where nobody has measured.
    """

    common: Merged
    devices: tuple[str, ...]
    rows: Float64Array
    scores: Float64Array
    temperatures: dict[str, float]
    mixtures: dict[str, Adapter] = field(default_factory=dict)
    trials: dict[str, Adapter] = field(default_factory=dict)
    candidates: dict[str, Adapter] = field(default_factory=dict)
    state: TrustState = field(default_factory=TrustState)


def personal_round(
    strategy: Strategy,
    view: RoundView,
    answers: Mapping[str, Answer],
    probes: Mapping[str, TopLogits],
    before: TrustState,
    settings: TrustSettings,
    *,
    version: int,
    last: bool = False,
) -> PersonalRound:
    """Merge a round whose updates are full adapters (`round_view.completed`), one a device.

    What the common adapter moved in the last round, `view.memory.momentum`, goes on in it and in
    all mixtures. `version` is the one that is made. After the `last` round there are no candidates,
    and a trial is what a device may keep, not what it answers about. All adapters come from one
    decomposition of the stacks.

    Raises:
        MergeError: the round cannot be merged.
    """
    state = before.heard(answers)
    momentum = settings.momentum
    common = RULES[COMMON](view, {"split": settings.split, "momentum": momentum})
    devices = tuple(update.device for update in view.updates)
    scores = round_scores(strategy, view, state, probes)
    mixed = [i for i in range(len(devices)) if np.isfinite(np.delete(scores[i], i)).any()]
    shares = np.array([common.weights[device] for device in devices])
    rows = np.tile(shares, (len(devices), 1))
    own = {i: state.temperature(devices[i]) for i in mixed}
    fixed = None if settings.temperature == "auto" else settings.temperature
    heat = {i: fixed or own[i].value(strategy) for i in mixed}
    for i in mixed:
        rows[i] = softmax_rows(scores[i : i + 1], heat[i])[0]
    tried = [] if fixed else mixed
    other = {i: own[i].last if last else own[i].trial for i in tried}
    trials = [softmax_rows(scores[i : i + 1], other[i].value(strategy))[0] for i in tried]
    offered = (
        draw(devices, settings.candidates, offered=state.offered, version=version, seed=view.seed)
        if strategy == "trust-validation" and not last
        else []
    )
    alone = np.eye(len(devices))[[devices.index(device) for device in offered]]
    wanted = np.concatenate([rows[mixed], np.reshape(trials, (-1, len(devices))), alone])
    pushed = np.repeat([momentum, 0.0], [len(mixed) + len(tried), len(offered)])
    adapters = iter(personal(view, wanted, pushed, split=settings.split))
    return PersonalRound(
        common,
        devices,
        rows,
        scores,
        {devices[i]: heat[i] for i in mixed},
        mixtures={devices[i]: next(adapters) for i in mixed},
        trials={devices[i]: next(adapters) for i in tried},
        candidates={device: next(adapters) for device in offered},
        state=state.model_copy(
            update={"offered": {**state.offered, **dict.fromkeys(offered, version)}}
        ),
    )
