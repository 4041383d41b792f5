"""A device whose update is refused is not out of the round: in the next attempt it trains again."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.faults.processes import PATIENCE_S, SmallFleet

pytestmark = pytest.mark.timeout(240)


def test_a_refused_device_trains_in_the_next_attempt(fleet: SmallFleet) -> None:
    job = json.loads(fleet.job_file.read_text())
    job["limits"] = {"update_norm": 1e-9}  # no update is small enough
    job["policy"] = {"deadline_s": 2, "quarantine_after": 1000}
    fleet.job_file.write_text(json.dumps(job))
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk = fleet.device("desk")
    deadline = time.monotonic() + PATIENCE_S
    while len(desk.of("rejected")) < 2:
        assert time.monotonic() < deadline, desk.events[-5:]
        time.sleep(0.1)
    assert {e["round"] for e in desk.of("rejected")} == {1}
    steps = [e["step"] for e in desk.of("step")]
    assert steps[:4] == [1, 2, 1, 2]
    attempts = [e["attempt"] for e in desk.of("round") if e["round"] == 1]
    assert attempts == sorted(set(attempts)) and len(attempts) >= 2
    assert not aggregator.of("counted") and not aggregator.of("merged")
    assert desk.end(signal.SIGTERM) == 0
    assert aggregator.end(signal.SIGTERM) == 0
