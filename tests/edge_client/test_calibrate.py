"""What is measured before a first round, and in how many processes: small boards take long."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

import base_tiny
from device_profiles.schema import load_profile
from edge_client import calibrate as calibrating
from edge_client.calibrate import Calibration
from edge_client.config import Settings
from edge_client.memory import Way
from edge_client.plan import Plan
from edge_client.planned_job import planned_job
from edge_client.prepare import Planning, planning
from edge_client.trainer.process import TrainingProcess
from edge_client.wanted import Wanted
from protocol.messages import Training
from protocol.transport import BrokerAddress
from tests.edge_client.test_plan import CALIBRATION, LADDER, SHAPES

F32 = replace(
    CALIBRATION,
    activations={w: a for w, a in CALIBRATION.activations.items() if w.dtype == "f32"},
    tokens_s={w: s for w, s in CALIBRATION.tokens_s.items() if w.dtype == "f32"},
)


def found_with(budget_mib: float, calibration: Calibration = F32) -> tuple[Planning, Plan]:
    wanted = Wanted(SHAPES, LADDER, 64, Training(tokens_per_step=1024, max_tokens=256))
    found = Planning(wanted, calibration, budget_mib, threads=1)
    return found, found.best()


def test_a_plan_is_unbeaten_where_more_memory_would_give_the_same() -> None:
    ample, best = found_with(100_000)
    assert ample.is_unbeaten(best)
    for budget in range(1250, 3000, 50):
        found, plan = found_with(budget)
        same = (plan.rank, plan.held, plan.way, plan.optimizer) == (
            best.rank,
            best.held,
            best.way,
            best.optimizer,
        )
        assert found.is_unbeaten(plan) == same
    assert not ample.is_unbeaten(replace(best, rank=32))
    assert not ample.is_unbeaten(replace(best, held=32))
    assert not ample.is_unbeaten(replace(best, seq_len=128))
    lean = replace(best, optimizer="adafactor")
    assert not ample.is_unbeaten(lean), "another dtype may have room for Adam's moments"
    asked = Training(tokens_per_step=1024, max_tokens=256, optimizer="adafactor")
    assert replace(ample, wanted=replace(ample.wanted, training=asked)).is_unbeaten(lean)
    alone = {Way("f32", True): F32.activations[Way("f32", True)]}
    speed = {Way("f32", True): 35.0}
    only, plan = found_with(100_000, replace(F32, activations=alone, tokens_s=speed))
    assert not only.is_unbeaten(plan), "without making blocks again it would be faster"


@pytest.mark.timeout(600)
def test_a_board_without_bf16_measures_all_in_one_process_and_float32_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []

    class Counted(TrainingProcess):
        def __init__(self, limit_mib: float = inf) -> None:
            begun.append(limit_mib)
            super().__init__(limit_mib)

    monkeypatch.setattr(calibrating, "TrainingProcess", Counted)
    job, _ = planned_job(None, "base-tiny", {"max_tokens": 64, "tokens_per_step": 128})
    settings = Settings(
        name="pi",
        broker=BrokerAddress("localhost", 1),
        data=(),
        state=tmp_path,
        cache=tmp_path,
        profile=load_profile("raspberry-pi-5-8gb"),
    )
    found = planning(settings, job, base_tiny.PATH, 0)
    assert len(begun) == 1, "threads and the probes"
    assert {way.dtype for way in found.calibration.activations} == {"f32"}
    assert found.is_unbeaten(found.best())
    assert planning(settings, job, base_tiny.PATH, 0).best() == found.best()
    assert len(begun) == 1, "it is remembered"
    least = found.best().predicted_mib / 2
    below = planning(settings, job, base_tiny.PATH, 0, below_mib=least)
    assert {way.dtype for way in below.calibration.activations} >= {"f32", "mixed"}
    assert below.best(below_mib=least).predicted_mib < least
    assert len(begun) > 1
