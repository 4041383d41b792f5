"""A device that was told no job stays for the next one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from edge_client.condition import in_words, read_condition
from protocol import topics
from protocol.files import write_durably
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import make_job
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


def test_a_job_that_is_withdrawn_is_left_for_the_next(
    tmp_path: Path, mosquitto: BrokerAddress, start: Callable[[Program], Program]
) -> None:
    key = SigningKey.generate()
    link = MqttTransport(mosquitto, "test-jobs", temporary=True)
    link.connect()

    def show(name: str) -> None:
        topic = topics.topic("job", job=name)
        job = make_job().model_copy(update={"job": name})
        link.publish(topic, key.seal(job, topic), retain=True).check()

    (tmp_path / "desk.txt").write_text("what I have written")
    hour = (datetime.now().hour + 12) % 24
    (tmp_path / "policy.toml").write_text(f'hours = ["{hour:02}:00-{hour:02}:30"]')
    arguments = ["run", "--json", "--broker", mosquitto]
    arguments += ["--data", tmp_path / "desk.txt", "--policy", tmp_path / "policy.toml"]
    stays = [*arguments, "--name", "desk", "--state", tmp_path / "desk"]
    goes = [*arguments, "--name", "once", "--state", tmp_path / "once", "--exit-when-done"]
    show("first")
    desk = start(Program("edge_client", stays, tmp_path, "desk"))
    once = start(Program("edge_client", goes, tmp_path, "once"))
    for device in (desk, once):
        device.wait_for("state", state="waiting")
    link.publish(topics.topic("job", job="first"), b"", retain=True).check()
    desk.wait_for("withdrawn", job="first")
    show("second")
    desk.wait_for("job", name="second")
    assert once.wait() == 0
    said = in_words(read_condition(tmp_path / "once", datetime.now()))
    assert said[1].endswith("job 'first' was withdrawn")
    assert desk.end(signal.SIGTERM, timeout_s=20) == 0
    (ended,) = desk.of("ended")
    assert ended["why"] == "told to stop by SIGTERM" and desk.stderr == once.stderr == ""
    link.close()
