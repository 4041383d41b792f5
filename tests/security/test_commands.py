"""The commands as an operator and a device's owner type them, rightly and wrongly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.broker import free_port, free_ports
from tests.aggregator.uploading import MODULES
from tests.conftest import running_mosquitto
from tests.faults.processes import Program
from tests.security.fleet import FleetFolder, make_folder, running_broker

pytestmark = pytest.mark.timeout(120)


def command(*arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_DATA_HOME": str(home), "COLUMNS": "200"},
    )


def write_job(path: Path) -> Path:
    """Write a job whose model no device has."""
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1000, "modules": MODULES}
    path.write_text(json.dumps({"job": "notes", "base": base, "ladder": [2, 4], "rounds": 1}))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_from_an_empty_folder_to_a_device_in_a_job_and_out_again(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    place, (port, enrol_port) = tmp_path / "our fleet", free_ports(2)
    options = ["--bind", "127.0.0.1", "--port", port, "--enroll-port", enrol_port]
    made = command("aggregator", "init", place, "--host", "localhost", *options, home=tmp_path)
    assert made.returncode == 0, made.stderr
    assert f"mosquitto -c '{place}/mosquitto.conf'" in made.stdout

    stack.enter_context(running_broker(FleetFolder(place)))
    job = write_job(tmp_path / "job.json")
    serving = Program(
        "aggregator", ["serve", job, "--dir", place, "--json"], tmp_path, "aggregator"
    )
    stack.enter_context(serving)
    assert serving.wait_for("enrolment")["port"] == enrol_port
    assert serving.wait_for("serving")["broker"] == f"mqtts://127.0.0.1:{port}"
    assert (place / "state" / "notes" / "store.sqlite").exists()

    token = command("aggregator", "enroll", "kitchen", "--dir", place, home=tmp_path)
    assert token.stdout.startswith("tf1-") and token.stdout.count("\n") == 1
    url = f"https://localhost:{enrol_port}"
    assert f"edge-client join {url} --token" in token.stderr
    joined = command(
        "edge_client", "join", url, "--token", token.stdout.strip(), home=tmp_path / "home"
    )
    assert joined.returncode == 0, joined.stderr
    assert "'kitchen'" in joined.stdout
    serving.wait_for("enrolled", device="kitchen")

    text = tmp_path / "notes.txt"
    text.write_text("what the kitchen says")
    run = ["run", "--data", text, "--model", "base-tiny", "--json"]
    device = stack.enter_context(Program("edge_client", run, tmp_path, "device"))
    assert device.wait() == 1
    assert "is not the job's 'toy'" in device.stderr
    assert serving.wait_for("device", device="kitchen", state="unfit")

    command("aggregator", "enroll", "desk", "--dir", place, home=tmp_path)
    unused = command("aggregator", "revoke", "desk", "--dir", place, home=tmp_path)
    assert unused.returncode == 0
    assert unused.stdout == "desk had not joined: its token is worth nothing now\n"

    out = command("aggregator", "revoke", "kitchen", "--dir", place, home=tmp_path)
    assert out.returncode == 0 and out.stdout.count("\n") == 1
    assert "has been told" in out.stdout
    again = stack.enter_context(Program("edge_client", run, tmp_path, "device"))
    assert again.wait() == 1
    assert again.stderr.count("\n") == 1 and "has been revoked" in again.stderr


def test_wrong_input_ends_in_one_line(tmp_path: Path, stack: ExitStack) -> None:
    fleet, running = make_folder(tmp_path / "fleet").path, make_folder(tmp_path / "running")
    stack.enter_context(running_broker(running))
    broker = f"https://localhost:{running.port}"
    mosquitto = stack.enter_context(running_mosquitto(tmp_path / "mosquitto"))
    plain = f"https://localhost:{mosquitto.port}"
    missing, job = tmp_path / "none", write_job(tmp_path / "job.json")
    token = "tf1-" + "A" * 74
    nobody = f"https://localhost:{free_port()}"
    good = command("aggregator", "enroll", "kitchen", "--dir", fleet, home=tmp_path).stdout.strip()
    said = {
        ("aggregator", "init", fleet, "--host", "a"): "is there already",
        ("aggregator", "init", missing, "--host", "mqtts://a"): "neither a host name nor",
        ("aggregator", "init", missing, "--host", "0.0.0.0"): "no device can connect to that",
        ("aggregator", "init", missing, "--host", "10.0.0.300"): "neither a host name nor",
        ("aggregator", "init", missing, "--host", "a", "--bind", "b"): "--bind 'b' is not an IP",
        ("aggregator", "init", missing, "--host", "a", "--port", 8884): "a port each",
        ("aggregator", "init", job / "x", "--host", "a"): "can't make",
        ("aggregator", "enroll", "kitchen", "--dir", missing): "aggregator init",
        ("aggregator", "enroll", "Kitchen!", "--dir", fleet): "can't be a device's name",
        ("aggregator", "enroll", "desk", "--dir", fleet, "--hours", "nan"): "--hours nan",
        ("aggregator", "enroll", "desk", "--dir", fleet, "--hours", "-1"): "--hours -1",
        ("aggregator", "revoke", "desk", "--dir", fleet): "no device 'desk'",
        ("aggregator", "revoke", "desk", "--dir", missing): "aggregator init",
        ("aggregator", "serve", job, "--dir", missing): "aggregator init",
        ("aggregator", "serve", job, "--enroll-port", 1): "--dir",
        ("aggregator", "serve", job, "--dir", fleet, "--no-wait"): "no MQTT broker at mqtts://",
        ("edge_client", "join", nobody, "--token", token): "copy all of what",
        ("edge_client", "join", nobody, "--token", good): "is `aggregator serve` running there",
        ("edge_client", "run", "--data", job): "has begun to join a fleet",
        ("edge_client", "join", "https://a..b", "--token", good): "can't join the fleet",
        ("edge_client", "join", broker, "--token", good): "does not do enrolment",
        ("edge_client", "join", plain, "--token", good): "does not do enrolment",
        ("edge_client", "join", "http://a", "--token", good): "write https://host:port",
        ("edge_client", "join", nobody, "--token", good, "--state", job): "name another --state",
    }
    for arguments, words in said.items():
        ended = command(*arguments, home=tmp_path / "home")
        assert ended.returncode == 1, (arguments, ended.stdout)
        assert ended.stderr.count("\n") == 1 and words in ended.stderr, (arguments, ended.stderr)
        assert "Errno" not in ended.stderr and "_ssl" not in ended.stderr
    assert not missing.exists()


def test_a_fleet_is_served_once(tmp_path: Path) -> None:
    fleet = make_folder(tmp_path / "fleet")
    job = write_job(tmp_path / "job.json")
    with fleet.served_here():
        ended = command("aggregator", "serve", job, "--dir", fleet.path, home=tmp_path)
    assert ended.returncode == 1 and "another aggregator serves" in ended.stderr


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """Even where the folder's name needs quoting."""
    fleet = make_folder(tmp_path / 'a "fleet" of 100% spaces')
    unit = fleet.path / "systemd" / "tunefleet-aggregator.service"
    drop_in = fleet.path / "systemd" / "mosquitto.service.d" / "tunefleet.conf"
    assert unit.exists() and "InaccessiblePaths=" in drop_in.read_text()
    whole = unit.with_name("mosquitto.service")
    whole.write_text("[Service]\nType=notify\nExecStart=/bin/true\n" + drop_in.read_text())
    for path in (unit, whole):
        try:
            checked = subprocess.run(
                ["systemd-analyze", "verify", path], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            pytest.skip("systemd is not installed")
        complaints = [line for line in checked.stderr.splitlines() if str(path.name) in line]
        assert complaints == []


def test_the_units_expose_little(tmp_path: Path) -> None:
    """systemd's own measure, 0 to 10, of what a service could do if it were broken into."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = make_folder(tmp_path / "fleet").path / "systemd" / "tunefleet-aggregator.service"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", ended.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze does not read files: {ended.stderr[-200:]}")
    assert float(found[1]) <= 3.0
    lines = unit.read_text().splitlines()
    assert {"Type=notify", "WatchdogSec=5min", "ExecReload=/bin/kill -HUP $MAINPID"} <= {*lines}
