"""Real devices tell what a job's weights go by, and no job hears more than it asks for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aggregator.merge.round_view import RoundView, Update
from aggregator.merge.told import discrepancy_share, loss_reduction_share
from protocol.adapter import Adapter
from protocol.metrics import LOSS_AFTER, LOSS_BEFORE, TOKEN_BUCKETS, asked_for
from tests.faults.processes import Event, SmallFleet

pytestmark = pytest.mark.timeout(240)
ALWAYS = {"held_out_loss", "train_loss"}


def shares(weights: str, counted: list[Event], tokens: dict[str, int]) -> list[float]:
    """Return the shares that follow from what devices told, by the engine's tested functions."""
    nothing = Adapter({}, 1.0)
    updates = [Update(e["device"], nothing, {}, tokens[e["device"]], e["metrics"]) for e in counted]
    view = RoundView(nothing, updates, {}, 4, 0)
    if weights == "loss-reduction":
        return loss_reduction_share(view).tolist()
    return discrepancy_share(view, 0.5, 0.1).tolist()


@pytest.mark.parametrize("weights", ["loss-reduction", "discrepancy"])
def test_what_real_devices_tell(fleet: SmallFleet, weights: str) -> None:
    settings = {"weights": weights}
    job = json.loads(fleet.job_file.read_text()) | {"rule_settings": settings, "rounds": 1}
    job["training"] |= {"steps": 6, "learning_rate": 1e-2}
    fleet.job_file.write_text(json.dumps(job))
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk = fleet.device("desk")
    desk.wait_for("plan")  # it measures the first time, and the other one need not
    kitchen = fleet.device("kitchen")
    kitchen.wait_for("plan")
    assert [desk.wait(), kitchen.wait(), aggregator.wait()] == [0, 0, 0]
    counted = sorted(aggregator.of("counted"), key=lambda e: str(e["device"]))
    assert not aggregator.of("warning")
    for event in counted:
        told = event["metrics"]
        assert set(told) == ALWAYS | set(asked_for(settings))
        if weights == "loss-reduction":
            assert 0 < told[LOSS_AFTER] < told[LOSS_BEFORE] < 10
        elif weights == "discrepancy":
            assert sum(told[name] for name in TOKEN_BUCKETS) == pytest.approx(1, abs=1e-3)
    (merged,) = aggregator.of("merged")
    tokens = {d.name: d.of("finished")[0]["tokens"] for d in (desk, kitchen)}
    found = [merged["weights"][e["device"]] for e in counted]
    np.testing.assert_allclose(found, shares(weights, counted, tokens), rtol=1e-9)
