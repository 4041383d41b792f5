"""The doctor on devices that lack something, with a real broker, and in a real fleet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edge_client.cli_models import host_name
from edge_client.doctor import Patient
from edge_client.doctor import broker as asking
from edge_client.doctor import here as looking
from edge_client.doctor.broker import checks_at_broker
from edge_client.doctor.find import find_patient
from edge_client.doctor.here import certificate, clock, data, disk, memory
from edge_client.errors import ConfigError
from edge_client.membership import identity, tls_files
from edge_client.policy.owner import Policy
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress
from tests.security.fleet import LEAVES_SOCKET, running_fleet

NOWHERE = BrokerAddress("127.0.0.1", 1)


def patient(folder: Path, broker: BrokerAddress = NOWHERE, **more: Any) -> Patient:
    fields: dict[str, Any] = {
        "name": "kitchen",
        "state": folder / "state",
        "cache": folder / "cache",
        "broker": broker,
        "tls": None,
        "data": (),
        "model": "",
        "memory_cap_mib": None,
        "policy": Policy(),
    }
    return Patient(**{**fields, **more})


def levels(of: Patient) -> dict[str, str]:
    return {check.name: check.level for check in checks_at_broker(of)}


def test_the_command_on_a_device_that_is_well_but_for_its_policy(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"page {n}: " + f"said {n} times. " * 20 for n in range(60)))
    now = datetime.now()
    policy = tmp_path / "policy.toml"
    policy.write_text(f'hours = ["{(now.hour + 2) % 24:02}:00-{(now.hour + 3) % 24:02}:01"]')
    command = [
        sys.executable, "-m", "edge_client", "doctor", "--json", "--data", str(text),
        "--broker", str(mosquitto), "--state", str(tmp_path / "state"), "--policy", str(policy),
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    found = {check["name"]: check for check in json.loads(ended.stdout)}
    assert ended.returncode == 0
    assert list(found) == [
        "clock", "TLS", "trust", "key", "disk", "memory", "packages", "onnx", "data", "policy",
        "broker", "rights", "limits",
    ]  # fmt: skip
    assert "outside the owner's hours" in found["policy"]["found"]
    assert found["data"]["level"] == "ok" and "examples: 1" in found["data"]["found"]
    assert found["rights"]["level"] == "warn", "there are no access rules"
    assert found["rights"]["remedy"]
    broken = [word.replace(str(mosquitto), str(NOWHERE)) for word in command]
    broken[broken.index(str(text))] = str(tmp_path / "nowhere")
    broken.remove("--json")
    ended = subprocess.run(broken, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    failed = [line for line in ended.stdout.splitlines() if line.startswith("fail")]
    assert ["no file or folder" in failed[0], "no MQTT broker" in failed[1]] == [True, True]


def test_a_broker_whose_packets_are_too_small(
    tmp_path: Path, mosquitto_small: BrokerAddress
) -> None:
    assert levels(patient(tmp_path, mosquitto_small))["limits"] == "fail"


def test_a_broker_that_lets_nobody_write(
    tmp_path: Path, mosquitto_read_only: BrokerAddress
) -> None:
    assert levels(patient(tmp_path, mosquitto_read_only))["rights"] == "fail"


def test_a_broker_that_does_not_answer_is_not_waited_for_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 3.0)
    monkeypatch.setattr(asking, "SILENT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as dumb:
        began = time.monotonic()
        (found,) = checks_at_broker(patient(tmp_path, BrokerAddress(*dumb.getsockname())))
        assert time.monotonic() - began < 8
    assert found.level == "fail" and "does not speak MQTT" in found.remedy
    assert f"waiting for an answer of {found.found.split()[4]}" in capsys.readouterr().err


def test_checks_are_shown_as_they_are_made_the_broker_last(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dumb:
        command = [
            sys.executable, "-m", "edge_client", "doctor", "--state", str(tmp_path / "state"),
            "--broker", str(BrokerAddress(*dumb.getsockname())),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            lines = [running.stdout.readline() for _ in range(10)]
            running.kill()
    assert lines[0].startswith("ok    clock") and "policy" in lines[9]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.txt", b"caf\xe9", "not valid UTF-8"),
        ("empty.txt", b"", "each of its files is empty"),
        ("old.pdf", b"%PDF", ".pdf files are not read"),
        ("folder/old.pdf", b"%PDF", "no file of a kind that is read"),
        ("folder/.keep", b"", "no file of a kind that is read"),
        ("x.jsonl", b'{"txt": "a"}', "it has neither 'text'"),
    ],
)
def test_text_that_can_not_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    path = file.parent if "/" in name else file
    found = data(patient(tmp_path, data=(path,)))
    assert found.level == "fail" and said in found.found and "\n" not in str(found)


def test_a_file_without_pyarrow_and_what_this_user_may_not_read(tmp_path: Path) -> None:
    """In a process of its own: root may read all, so that becomes somebody else."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    locked = tmp_path / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "inner" / "a.txt").write_text("mine")
    code = """
import os, sys
from pathlib import Path
sys.modules["pyarrow"] = None
from edge_client.data import read_examples
from edge_client.data.read import check_paths
from edge_client.errors import DataError
from edge_client.doctor.here import disk
from tests.edge_client.test_doctor import patient
rows, locked = map(Path, sys.argv[1:])
def said(path):
    for look in (check_paths, read_examples):
        try: look([path])
        except DataError as error: print(error)
said(rows)
if os.geteuid() == 0: os.setreuid(65534, 65534)
said(locked)
said(locked / "inner" / "a.txt")
print(disk(patient(locked)).level)
"""
    os.chmod(tmp_path, 0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    locked.chmod(0)
    try:
        command = [sys.executable, "-c", code, str(tmp_path / "rows.parquet"), str(locked)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        locked.chmod(0o755)
    assert ended.stderr == ""
    first, *others, level = ended.stdout.splitlines()
    assert "needs pyarrow" in first and "pip install" in first
    assert len(others) == 4 and level == "fail"
    assert all("Permission denied" in line for line in others)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature_below": 25.0},
        {"idle_below": 0.001},
        {"minutes_a_day": 0.01},
        {"mib_a_day": 0.01},
    ],
)
def test_a_policy_that_hardly_ever_lets_it_train_is_said(
    tmp_path: Path, setting: dict[str, float]
) -> None:
    (name,) = setting
    found = looking.policy(patient(tmp_path, policy=Policy(**setting)))
    assert found.level == "warn" and f"hardly ever train so ({name} = " in found.remedy
    usual = Policy(minutes_a_day=240.0, mib_a_day=100.0, idle_below=0.9, temperature_below=110.0)
    assert "hardly" not in looking.policy(patient(tmp_path, policy=usual)).remedy


def find(state: Path, **options: Any) -> Patient:
    given: dict[str, Any] = {
        "name": "", "host_name": "kitchen", "state": state, "broker": "", "policy": None,
        "cache": state / "cache", "data": (), "model": "", "memory_cap_mib": None,
    }  # fmt: skip
    return find_patient(**{**given, **options})


def test_a_wrong_policy_and_a_damaged_membership_are_findings_among_others(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("minutes_a_day = 'many'")
    (tmp_path / "fleet.json").write_text('{"device": "kit')
    (tmp_path / "device.key").write_bytes(b"xy")
    command = [sys.executable, "-m", "edge_client", "doctor", "--state", str(tmp_path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    found = {check["name"]: check for check in json.loads(ended.stdout)}
    assert list(found) == [
        "fleet", "clock", "TLS", "trust", "key", "disk", "memory", "packages", "onnx", "data",
        "policy", "broker",
    ]  # fmt: skip
    said = {name: check["found"] for name, check in found.items() if check["level"] == "fail"}
    assert "fleet.json is damaged" in said["fleet"] and "minutes_a_day" in said["policy"]
    assert "holds no key (32 bytes)" in said["key"]
    assert found["broker"]["level"] == "warn" and "not tried" in found["broker"]["found"]


def test_a_broker_in_fleet_json_that_is_none_and_joining_not_finished(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text('{"device": "kitchen", "broker": "ftp://x"}')
    assert "ftp://x" in find(tmp_path).bad_membership
    (tmp_path / "fleet.json").unlink()
    (tmp_path / "tls.key").touch()
    begun = find(tmp_path)
    assert "has not finished" in begun.bad_membership
    assert certificate(begun).level == "fail"


def test_the_key_of_a_device(tmp_path: Path) -> None:
    device = patient(tmp_path)
    assert looking.key(device).level == "ok" and "none yet" in looking.key(device).found
    lost = patient(tmp_path, tls=tls_files(device.state))
    assert looking.key(lost).level == "fail" and "join again" in looking.key(lost).remedy
    SigningKey.load_or_create(device.state / "device.key")
    assert looking.key(lost).level == "ok"


@pytest.mark.parametrize("cap", [float("nan"), -5.0, 0.0])
def test_a_cap_that_run_refuses_is_refused(tmp_path: Path, cap: float) -> None:
    with pytest.raises(ConfigError, match="--memory-cap must be from 1"):
        find(tmp_path, memory_cap_mib=cap)


@LEAVES_SOCKET
def test_in_a_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_fleet(tmp_path) as fleet:
        fleet.join("kitchen")
        state = fleet.devices / "kitchen"
        name, broker, tls = identity(state, name="", broker="", default_name=host_name())
        device = patient(tmp_path, broker, name=name, state=state, tls=tls)
        assert levels(device) == {"broker": "ok", "rights": "ok", "limits": "ok"}
        assert certificate(device).level == "ok"
        monkeypatch.setattr(looking, "DEFAULT_PORT", urlsplit(fleet.url).port)
        assert clock(device).found.endswith("as the aggregator's")
        monkeypatch.setattr(looking, "APART", timedelta(seconds=-1))
        assert clock(device).level == "fail"
        other = patient(tmp_path, broker, name="another", state=state, tls=tls)
        assert levels(other)["rights"] == "fail", "the name is not that of its certificate"


def test_what_a_computer_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = patient(tmp_path, memory_cap_mib=200.0)
    assert memory(device).level == "fail" and "--memory-cap" in memory(device).remedy
    assert disk(device).level == "ok"
    monkeypatch.setattr(looking, "LEAST_DISK_MIB", 10**9)
    monkeypatch.setattr(looking, "LOW_DISK_MIB", 10**9)
    assert disk(device).level == "fail"
    lost = patient(tmp_path, tls=tls_files(tmp_path / "nothing"))
    assert certificate(lost).level == "fail"

    class Early(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(1970, 1, 1, tzinfo=timezone.utc)

    monkeypatch.setattr(looking, "datetime", Early)
    assert clock(device).level == "fail"
