"""A newcomer's mistakes: each is refused at once, in words that say what, where and what to do.

None of these loads torch; those of model folders are in tests/edge_client/test_model.py.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregator.config import build_job
from aggregator.daemon import Daemon
from aggregator.errors import ConfigError, StoreError
from aggregator.export import export_adapter
from aggregator.rounds import Policy
from aggregator.store import Store
from device_profiles.errors import FleetError, ReplayError
from device_profiles.fleet import read_fleet
from device_profiles.replay import clear_broker
from device_profiles.schema import load_profile
from edge_client import config as edge_config
from edge_client import errors as edge_errors
from edge_client.discover import discover_job
from edge_client.membership import read_membership
from protocol import topics
from protocol.broker import EmbeddedBroker, free_port
from protocol.errors import StateError, TransportError
from protocol.events import EventLog
from protocol.files import lock_folder
from protocol.messages import Job, Status
from protocol.patience import Waiting
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

RUNNER = CliRunner()


@pytest.mark.parametrize(
    "url", ["mqtt://[::1", "mqtt://h:0", "mqtt:// ", "mqtt://h:x", "mqtt://h/topic", "http://h"]
)
def test_what_is_no_broker_address(url: str) -> None:
    with pytest.raises(TransportError, match="is not a broker address; write mqtt://"):
        BrokerAddress.parse(url)


def test_a_password_is_not_dropped_in_silence() -> None:
    with pytest.raises(TransportError, match="not supported yet") as caught:
        BrokerAddress.parse("mqtt://me:secret@host")
    assert "secret" not in str(caught.value)


def test_a_port_in_use(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broker = EmbeddedBroker(port=taken.getsockname()[1])
        with pytest.raises(TransportError, match=r"in use.*; name another port with --port"):
            broker.start()
    assert capfd.readouterr().err == ""


def test_a_state_folder_in_use_or_in_the_way(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, "edge-client"),
        pytest.raises(StateError, match="another edge-client is running with its state in"),
        lock_folder(tmp_path, "edge-client"),
    ):
        pass
    with lock_folder(tmp_path, "edge-client"):
        pass  # the lock ended with its holder
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file: .*--state"), lock_folder(tmp_path / "file", "x"):
        pass


def test_a_damaged_key(tmp_path: Path) -> None:
    (tmp_path / "device.key").write_text("not a key")
    with pytest.raises(StateError, match=r"device\.key holds no key"):
        SigningKey.load_or_create(tmp_path / "device.key")


# -- the aggregator --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy": {"deadline_s": float("inf")}}, "policy.deadline_s"),
        ({"policy": {"min_devices": 1 << 70}}, "policy.min_devices"),
        ({"limits": {"upload_bytes": 0}}, "limits.upload_bytes"),
    ],
)
def test_numbers_that_no_job_can_run_with(fields: dict[str, Any], said: str) -> None:
    job = make_job().model_dump()
    with pytest.raises(ConfigError, match=said):
        build_job({**job, **fields}, "job.toml")


def serve(job: Job, state: Path, broker: BrokerAddress) -> Daemon:
    key = SigningKey.load_or_create(state.with_suffix(".key"))
    return Daemon(job, Policy(), Store(state), broker, EventLog(as_json=True), key=key)


def test_a_damaged_version_is_neither_served_nor_exported(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    daemon = serve(make_job(), tmp_path / "state", mosquitto)
    daemon.start()
    daemon._link.close()
    export_adapter(tmp_path / "state", tmp_path / "out")
    for path in (tmp_path / "state" / "versions" / "1").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = serve(make_job(), tmp_path / "state", mosquitto)
    with pytest.raises(StoreError, match="is not what version 1 was published as"):
        again.start()
    again.close()
    for path in (tmp_path / "state" / "versions" / "1").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match=r"version 1 in .* is damaged"):
        export_adapter(tmp_path / "state", tmp_path / "out")


def test_a_job_that_another_aggregator_serves(tmp_path: Path, mosquitto: BrokerAddress) -> None:
    job = make_job()
    first = serve(job, tmp_path / "first", mosquitto)
    first.start()
    with pytest.raises(StoreError, match=r"from another aggregator.*another job name"):
        serve(job, tmp_path / "second", mosquitto).start()
    assert first._link.connected
    assert first._link.connection == 1, "the first one was pushed off the broker"
    first._link.close()


# -- the device ------------------------------------------------------------------------------------


def settings(tmp_path: Path, broker: BrokerAddress) -> edge_config.Settings:
    return edge_config.Settings(
        name="kitchen",
        broker=broker,
        data=(tmp_path,),
        state=tmp_path,
        cache=tmp_path,
        profile=load_profile("laptop-16gb"),
    )


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"memory_cap_mib": 0.0}, "--memory-cap"),
        ({"memory_cap_mib": float("nan")}, "--memory-cap"),
        ({"memory_scale": 0.0}, "--memory-scale"),
        ({"memory_scale": float("inf")}, "--memory-scale"),
        ({"threads": -1}, "--threads"),
        ({"threads": 100_000}, "--threads"),
        ({"seed": -1}, "--seed"),
        ({"job": "A b/c"}, "--job"),
    ],
)
def test_numbers_that_no_device_can_run_with(
    tmp_path: Path, fields: dict[str, Any], option: str
) -> None:
    fine = settings(tmp_path, BrokerAddress("127.0.0.1", 1))
    with pytest.raises(edge_errors.ConfigError, match=f"{option} must be"):
        replace(fine, **fields)


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(edge_errors.ConfigError, match="--cache"):
        edge_config.check_cache(tmp_path / "file")


def test_missing_data_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    from edge_client.cli import app

    result = RUNNER.invoke(app, ["run", "--data", str(tmp_path / "nothing")])
    assert isinstance(result.exception, edge_errors.DataError)
    assert "there is no file or folder" in str(result.exception)


@pytest.mark.parametrize("damage", ["", "{}", "oops", '{"device": "A b", "broker": "x"}'])
def test_a_damaged_membership_is_one_line(tmp_path: Path, damage: str) -> None:
    (tmp_path / "fleet.json").write_text(damage)
    with pytest.raises(edge_errors.ConfigError, match=r"fleet\.json is damaged \(.*\); ") as caught:
        read_membership(tmp_path)
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_a_state_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(edge_errors.ConfigError, match="file is a file; name a folder"):
        read_membership(tmp_path / "file")


def publish_status(broker: BrokerAddress, key: SigningKey, *, online: bool) -> None:
    topic = topics.topic("status", job="replay", device="kitchen")
    state = "idle" if online else "stopped"
    status = Status(job="replay", device="kitchen", online=online, boot=1, state=state)
    link = MqttTransport(broker, "test-status", temporary=True)
    link.connect()
    link.publish(topic, key.seal(status, topic), retain=True)
    link.close()


def test_a_name_that_another_device_has(tmp_path: Path, mosquitto: BrokerAddress) -> None:
    mine, other = SigningKey.generate(), SigningKey.generate()
    asked = replace(settings(tmp_path, mosquitto), job="replay")
    publish_status(mosquitto, other, online=False)
    waiting = Waiting(EventLog(as_json=True))
    with pytest.raises(edge_errors.NameTaken, match="'kitchen'; choose another --name"):
        discover_job(asked, mine.public, lambda: False, waiting)
    assert discover_job(asked, other.public, lambda: False, waiting) == "replay"


def test_a_broker_that_is_not_there_for_who_does_not_wait(
    tmp_path: Path, start: Callable[[Program], Program]
) -> None:
    (tmp_path / "notes.txt").write_text("some text")
    model = make_job().base.model_dump(mode="json")
    job = {"job": "notes", "base": model, "ladder": [2, 4]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    nobody = f"mqtt://127.0.0.1:{free_port()}"
    where = ["--broker", nobody, "--no-wait", "--state"]
    device = ["run", "--data", tmp_path / "notes.txt", "--profile", "laptop-16gb", *where]
    for module, arguments in (
        ("edge_client", [*device, tmp_path / "device"]),
        ("aggregator", ["serve", tmp_path / "job.json", *where, tmp_path / "aggregator"]),
    ):
        program = start(Program(module, arguments, tmp_path, module))
        assert program.wait() == 1
        assert program.stderr == (
            f"error: no MQTT broker at {nobody} (Connection refused); start one, or name another "
            "with --broker\n"
        )


# -- the replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ('name = "a/b"', "can't be a device's name"),
        ('name = "a b"', "can't be a device's name"),
        ('name = ""', "can't be a device's name"),
        ("name = 3", "can't be a device's name"),
        ('name = "aggregator"', "can't be a device's name"),
        ('name = "a"\nprofil = "x"', "a device has no 'profil'"),
        ('name = "a"\ndata = 5', "data is a path or a list of paths"),
        ('name = "a"\ndata = []', "data is a path or a list of paths"),
    ],
)
def test_mistakes_in_a_fleet_file(tmp_path: Path, device: str, said: str) -> None:
    data = "" if "data" in device else 'data = "fleet.toml"'
    file = tmp_path / "fleet.toml"
    file.write_text(f'[[device]]\nprofile = "laptop-16gb"\n{device}\n{data}\n')
    with pytest.raises(FleetError, match=said):
        read_fleet(file)


def test_a_broker_forgets_the_replay_before(mosquitto: BrokerAddress) -> None:
    """Its keys are others, so that nobody would listen to the new aggregator and devices."""
    publish_status(mosquitto, SigningKey.generate(), online=True)
    with pytest.raises(ReplayError, match="another replay is running on"):
        clear_broker(str(mosquitto), "replay", ["kitchen"])
    publish_status(mosquitto, SigningKey.generate(), online=False)
    clear_broker(str(mosquitto), "replay", ["kitchen"])
    link = MqttTransport(mosquitto, "test-look", temporary=True)
    link.connect()
    link.subscribe(["tunefleet/#"])
    assert link.receive(0.3) is None
    link.close()
