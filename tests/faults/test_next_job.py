"""A device that was told no job stays for the next one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.files import write_durably
from protocol.signing import SigningKey
from tests.faults.processes import Program, SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60


def test_a_device_goes_from_a_finished_job_to_the_next(
    fleet: SmallFleet, tmp_path: Path, calibrations: Path, start: Callable[[Program], Program]
) -> None:
    job = json.loads(fleet.job_file.read_text())
    arguments = ["run", "--json", "--name", "desk", "--threads", "1", "--broker", fleet.broker]
    arguments += ["--data", tmp_path / "desk.txt", "--state", tmp_path / "desk"]
    arguments += ["--cache", calibrations, "--profile", "laptop-16gb"]
    desk = start(Program("edge_client", arguments, tmp_path, "desk"))
    key = SigningKey.generate()  # of one aggregator: a device believes the first that it has heard
    for name in ("first", "second"):
        write_durably(tmp_path / name / "aggregator.key", key._key.private_bytes_raw())
        policy = {"min_devices": 1, "quorum": 1}
        fleet.job_file.write_text(json.dumps({**job, "job": name, "rounds": 1, "policy": policy}))
        aggregator = fleet.aggregator("--state", tmp_path / name)
        aggregator.wait_for("counted", device="desk", round=1)
        assert aggregator.wait() == 0
        finished = "finished: first" if name == "first" else "finished: first, second"
        desk.wait_for("waiting", what="another job", why=finished)
    assert len(desk.of("finished")) == 2
    assert desk.end(signal.SIGTERM, timeout_s=10) == 0
    assert desk.stderr == ""
