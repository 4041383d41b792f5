"""`aggregator withdraw`: a job is taken off a broker."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from aggregator.cli import app
from aggregator.errors import ConfigError, JobInUse
from aggregator.kept import kept_messages
from protocol import topics
from protocol.messages import Status
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program
from tests.security.fleet import running_fleet

pytestmark = pytest.mark.timeout(120)


def withdraw(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["withdraw", *map(str, arguments)])


def kept(broker: BrokerAddress, job: str) -> set[str]:
    link = MqttTransport(broker, "test-look", temporary=True)
    link.connect()
    found = {m.topic for m in kept_messages(link, job, [f"{topics.ROOT.format(job=job)}/#"])}
    link.close()
    return found


def say_status(broker: BrokerAddress, device: str, *, online: bool) -> None:
    topic = topics.topic("status", job="notes", device=device)
    state = "idle" if online else "stopped"
    status = Status(job="notes", device=device, online=online, boot=1, state=state, profile="any")
    link = MqttTransport(broker, f"test-{device}", temporary=True)
    link.connect()
    link.publish(topic, SigningKey.generate().seal(status, topic), retain=True).check()
    link.close()


@pytest.fixture
def left_alone(tmp_path: Path, mosquitto: BrokerAddress) -> BrokerAddress:
    """Return a broker with two jobs whose aggregators have gone."""
    for name in ("notes", "letters"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**make_job().model_dump(), "job": name}))
        arguments = ["serve", file, "--state", tmp_path / name, "--json", "--broker", mosquitto]
        with Program("aggregator", arguments, tmp_path, name) as aggregator:
            aggregator.wait_for("serving")
            assert aggregator.end(signal.SIGTERM) == 0
    return mosquitto


def test_nothing_of_the_job_is_left_and_all_of_others(left_alone: BrokerAddress) -> None:
    others = kept(left_alone, "letters")
    before = kept(left_alone, "notes")
    assert {topics.match(topic).kind for topic in before} >= {"job", "round", "global_chunk"}
    say_status(left_alone, "kitchen", online=False)
    done = withdraw("notes", "--broker", left_alone)
    assert done.exit_code == 0, done.output
    assert f"{len(before) + 1} messages cleared" in done.output
    assert kept(left_alone, "notes") == set()
    assert kept(left_alone, "letters") == others
    assert "has nothing of job 'notes'" in withdraw("notes", "--broker", left_alone).output


def test_not_while_devices_are_online_unless_forced(left_alone: BrokerAddress) -> None:
    before = kept(left_alone, "notes")
    say_status(left_alone, "kitchen", online=True)
    refused = withdraw("notes", "--broker", left_alone).exception
    assert isinstance(refused, JobInUse)
    assert "kitchen" in str(refused) and "--force" in str(refused)
    assert kept(left_alone, "notes") > before
    assert withdraw("notes", "--broker", left_alone, "--force").exit_code == 0
    assert kept(left_alone, "notes") == set()


def test_a_job_that_can_not_be_withdrawn() -> None:
    for arguments in (["notes"], ["a/#", "--broker", "mqtt://127.0.0.1:1"]):
        assert isinstance(withdraw(*arguments).exception, ConfigError)


@pytest.mark.parametrize(
    ("may", "said"),
    [
        ("readwrite", "5 messages cleared\n"),
        ("read", "4 messages cleared; statuses that only their devices may clear: 1"),
    ],
)
def test_in_a_fleet_with_certificates(tmp_path: Path, may: str, said: str) -> None:
    """All goes, or where devices' topics are theirs alone all but their statuses."""
    key = SigningKey.generate()
    with running_fleet(tmp_path) as fleet:
        rules = fleet.folder.path / "acl"
        theirs = [
            topics.subscription(k) for k, row in topics.TABLE.items() if row.publisher == "device"
        ]
        text = rules.read_text()
        for topic in theirs:
            text = text.replace(f"topic readwrite {topic}", f"topic {may} {topic}")
        rules.write_text(text)
        assert fleet.folder.reload_broker()
        topic = topics.topic("job", job="notes")
        aggregator = fleet.aggregator()
        aggregator.publish(topic, key.seal(make_job(), topic), retain=True).check()
        fields = {"job": "notes", "version": 2}
        for kind, who in (("personal", "device"), ("trial", "device"), ("candidate", "number")):
            one = {**fields, who: "kitchen" if who == "device" else 0}
            aggregator.publish(topics.topic(f"{kind}_manifest", **one), b"x", retain=True).check()
        aggregator.close()
        device = fleet.link(fleet.join("kitchen"), "kitchen")
        own = topics.topic("status", job="notes", device="kitchen")
        status = Status(
            job="notes", device="kitchen", online=False, boot=1, state="stopped", profile="any"
        )
        device.publish(own, key.seal(status, own), retain=True).check()
        done = withdraw("notes", "--dir", fleet.folder.path)
        assert done.exit_code == 0, (done.output, done.exception)
        assert said in done.output
        every = f"{topics.ROOT.format(job='notes')}/#"
        assert [m.topic for m in kept_messages(device, "notes", [every])] == []
