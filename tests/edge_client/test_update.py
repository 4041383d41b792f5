"""What a round taught becomes an upload, unless it taught nothing that can be sent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edge_client.errors import TrainingDiverged
from edge_client.learning import Learned
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import TextReport
from edge_client.update import make_update
from protocol.adapter import Adapter, Factors
from protocol.messages import Job, Round, UploadManifest

TEXT = TextReport(30, 1, (), (30, 0, 10, *[0] * 13))
ROUND = Round(job="notes", number=3, state="open", version=3)
CHANGE = Adapter({"m": Factors(np.ones((2, 6), np.float32), np.ones((8, 2), np.float32))}, 2.0)


def made(settings: dict[str, Any], loss: float, *sample: float) -> UploadManifest:
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": (8, 6)}}
    job = Job.model_validate({"job": "notes", "base": base, "scale": 2, "rule_settings": settings})
    before_after = (sample[0], sample[1]) if sample else None
    report = TrainReport(12, 1000, loss, 1.0, before_after)
    learned = Learned(CHANGE, 2, 2, 0.0, 0.0, report, 4, {})
    return make_update(job, ROUND, "pi", learned, TEXT, held_out_loss=1.0)[0]


@pytest.mark.parametrize("losses", [(math.nan,), (1.0, 2.0, math.inf)])
def test_a_loss_that_is_not_finite_is_said_in_words_and_not_sent(losses: tuple[float, ...]) -> None:
    with pytest.raises(TrainingDiverged, match=r"round 3: its loss is (nan|inf); .*learning_rate"):
        made({}, *losses)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, {}),
        ({"weights": "samples"}, {}),
        ({"weights": "loss-reduction"}, {"train_loss_before": 2.0, "train_loss_after": 1.5}),
        (
            {"weights": "discrepancy"},
            {f"tokens_{i}": {0: 0.75, 2: 0.25}.get(i, 0.0) for i in range(16)},
        ),
    ],
)
def test_a_job_is_told_what_it_asks_for_and_no_more(
    settings: dict[str, Any], told: dict[str, float]
) -> None:
    manifest = made(settings, 1.75, 2.0, 1.5)
    assert manifest.metrics == {"held_out_loss": 1.0, "train_loss": 1.75, **told}
