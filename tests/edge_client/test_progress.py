"""Whoever measures or reads for long says on the way that it goes on: a service's watchdog asks."""

from __future__ import annotations

from pathlib import Path

import pytest

import base_tiny
from edge_client.plan import Plan
from edge_client.trainer import process as agents_side
from edge_client.trainer.probing import ProbeTask
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text

FILES = 5
TASK = ProbeTask(base_tiny.PATH, "f32", 10.0, 2, 128, 2.0)
PLAN = Plan(4, 8, 1, 64, False, "f32", 1, 10.0, 100.0)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return what grows by one each time that the watchdog is fed."""
    found: list[None] = []
    monkeypatch.setattr(agents_side, "alive", lambda: found.append(None))
    return found


def test_measuring_is_heard_step_by_step(heard: list[None]) -> None:
    with TrainingProcess() as process:
        report = process.call("calibrate", task=TASK)
        probes = sum(len(way) for way in report.probes.values())
        assert probes >= 4 and len(heard) > 3 * probes, "evaluated, first step, second step"
        heard.clear()
        process.call("choose_threads", task=TASK)
        assert len(heard) > 3 * 2, "two counts of threads, those near each other twice"


def test_reading_is_heard_file_by_file(heard: list[None], tmp_path: Path) -> None:
    for number in range(FILES):
        (tmp_path / f"{number}.txt").write_text(f"page {number}: " + "what was said. " * 200)
    with TrainingProcess() as process:
        process.call("open", model=base_tiny.PATH, text=Text((tmp_path,), 0), plan=PLAN)
    assert len(heard) > FILES + 3, "each file, and a batch of tokens of each split"
