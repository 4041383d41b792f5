"""The doctor on devices that lack something, with a real broker, and in a real fleet."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edge_client.cli import _host_name
from edge_client.doctor import Patient
from edge_client.doctor import here as looking
from edge_client.doctor.broker import checks_at_broker
from edge_client.doctor.here import certificate, clock, disk, memory
from edge_client.membership import identity, tls_files
from edge_client.policy.owner import Policy
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
        "clock", "TLS", "trust", "disk", "memory", "packages", "onnx", "data", "policy",
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


@LEAVES_SOCKET
def test_in_a_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_fleet(tmp_path) as fleet:
        fleet.join("kitchen")
        state = fleet.devices / "kitchen"
        name, broker, tls = identity(state, name="", broker="", default_name=_host_name())
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
