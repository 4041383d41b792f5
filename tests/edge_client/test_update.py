"""What a round taught becomes an upload, unless it taught nothing that can be sent."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_client.errors import TrainingDiverged
from edge_client.update import make_update


def test_a_loss_that_is_not_finite_is_said_in_words_and_not_sent() -> None:
    job = SimpleNamespace(training=SimpleNamespace(learning_rate=1e30))
    learned = SimpleNamespace(report=SimpleNamespace(loss=math.nan))
    with pytest.raises(TrainingDiverged, match=r"round 3: its loss is nan; .*learning_rate"):
        make_update(
            cast(Any, job),
            cast(Any, SimpleNamespace(number=3)),
            "pi",
            cast(Any, learned),
            held_out_loss=1.0,
        )
