"""Whoever is killed, the job goes on where it was, and each update counts once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from edge_client.outbox import Outbox
from protocol import topics
from protocol.messages import UploadManifest
from protocol.signing import open_message
from protocol.transport import BrokerAddress
from tests.conftest import running_mosquitto
from tests.faults.processes import Listener, SmallFleet

pytestmark = pytest.mark.timeout(240)  # seconds where nobody else uses the machine: below 60
MANY_STEPS = 40


def listening(port: int) -> psutil.Process:
    """Return the process, a child of this one, that listens on a port."""
    for child in psutil.Process().children():
        if any(c.laddr.port == port and c.status == "LISTEN" for c in child.net_connections()):
            return child
    pytest.fail(f"nobody listens on {port}")


def test_a_killed_aggregator_resumes_its_round(fleet: SmallFleet) -> None:
    first = fleet.aggregator()
    first.wait_for("serving")
    kitchen, desk = fleet.device("kitchen"), fleet.device("desk")
    desk.wait_for("state", state="training")
    os.killpg(desk.process.pid, signal.SIGSTOP)
    first.wait_for("counted", device="kitchen", round=1)
    first.end(signal.SIGKILL)
    os.killpg(desk.process.pid, signal.SIGCONT)
    assert not first.of("merged")

    second = fleet.aggregator()
    assert second.wait_for("serving")["round"] == 1
    assert [kitchen.wait(), desk.wait(), second.wait()] == [0, 0, 0]
    fleet.counted_once(first, second)


@pytest.mark.parametrize("fleet", [MANY_STEPS], indirect=True)
def test_a_device_killed_while_training_trains_the_round_again(fleet: SmallFleet) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk, kitchen = fleet.device("desk"), fleet.device("kitchen")
    kitchen.wait_for("step", round=1, step=2)
    training = psutil.Process(kitchen.process.pid).children(recursive=True)
    assert training
    kitchen.end(signal.SIGKILL)
    assert psutil.wait_procs(training, timeout=20)[1] == [], "training goes on without its agent"
    aggregator.wait_for("device", device="kitchen", online=False)  # its will

    again = fleet.device("kitchen")
    assert [again.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)


def test_a_device_killed_while_uploading_goes_on_from_its_outbox(fleet: SmallFleet) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    uploads = Listener(fleet.broker, "tunefleet/1/small/d/kitchen/up/#", "uploads")
    answers = Listener(fleet.broker, "tunefleet/1/small/d/kitchen/ctl", "answers")
    desk, kitchen = fleet.device("desk"), fleet.device("kitchen")
    kitchen.wait_for("state", state="training")
    aggregator.process.send_signal(signal.SIGSTOP)
    offered = uploads.wait_for(lambda m: topics.match(m.topic).kind == "upload_manifest")
    manifest, _ = open_message(offered.payload, offered.topic, UploadManifest)
    kitchen.end(signal.SIGKILL)

    # Offered and asked for before the crash, offered again and sent after it.
    aggregator.process.send_signal(signal.SIGCONT)
    answers.wait_for(lambda m: b"need" in m.payload)
    kitchen = fleet.device("kitchen", fault="device.chunks.sent")
    uploads.wait_for(lambda m: m.topic.endswith(f"/{len(manifest.file.chunks) - 1}"))
    assert kitchen.wait() == -signal.SIGKILL

    # `done` waits at the broker for a device that knows of no job yet.
    answers.wait_for(lambda m: b"done" in m.payload)
    kitchen = fleet.device("kitchen")
    assert [kitchen.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    assert [e["round"] for e in kitchen.of("step")] == [2, 2], "round 1 was trained already"
    fleet.counted_once(aggregator)
    outbox = Outbox(fleet.job_file.parent / "kitchen")
    assert outbox.drawn_rows("small") == 4, "round 2 went on in the text where round 1 had stopped"
    outbox.close()
    uploads.close()
    answers.close()


@pytest.mark.parametrize("fleet", [MANY_STEPS], indirect=True)
def test_a_broker_that_forgets_everything_is_told_again(
    fleet: SmallFleet, mosquitto: BrokerAddress, tmp_path: Path
) -> None:
    aggregator = fleet.aggregator()
    aggregator.wait_for("serving")
    desk, kitchen = fleet.device("desk"), fleet.device("kitchen")
    kitchen.wait_for("step", round=1, step=2)
    listening(mosquitto.port).kill()
    desk.end(signal.SIGKILL)  # it will need the job and the version again
    time.sleep(2)  # long enough that everybody has noticed
    with running_mosquitto(tmp_path / "again", port=mosquitto.port):
        desk = fleet.device("desk")
        assert [kitchen.wait(), desk.wait(), aggregator.wait()] == [0, 0, 0]
    fleet.counted_once(aggregator)
