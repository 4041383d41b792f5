"""A device in another language, written from docs/protocol.md, takes part in a real fleet."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from aggregator.enrol.folder import FleetFolder
from protocol.adapter import directions
from protocol.broker import free_ports
from tests.faults.processes import Program
from tests.security.fleet import running_broker

pytestmark = pytest.mark.timeout(180)

HERE = Path(__file__).parent
# Names whose order by bytes is not that of the numbers, two chunks, and a module that is narrower
# than the ladder.
MODULES = {"l.2.q": (30, 20000), "l.10.q": (30, 20000), "l.2.k": (3, 40)}
JOB, DEVICE, LADDER = "notes", "kitchen", (2, 4)
Matrix = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def node_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the device's program in a folder where its one package is installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"node {version.stdout.strip()} is older than 20")
    folder = tmp_path_factory.mktemp("node")
    for name in ("device.mjs", "package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    try:
        ended = subprocess.run(
            ["npm", "ci", *options], cwd=folder, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not get the package mqtt in time")
    if ended.returncode:
        why = next((line for line in ended.stderr.splitlines() if "npm error" in line), "")
        pytest.skip(f"npm can't install the package mqtt: {why}")
    return folder / "device.mjs"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def aggregator(*arguments: object) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "aggregator", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def exported(state: Path, out: Path, version: int) -> dict[str, tuple[Matrix, Matrix]]:
    """Return A and B of each module, of a version that the aggregator has written for PEFT."""
    aggregator("export", out, "--state", state, "--version", version)
    tensors = load_file(out / "adapter_model.safetensors")
    found = {}
    for name in MODULES:
        a, b = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        found[name] = tensors[a].astype(np.float32), tensors[b].astype(np.float32)
    return found


def checksums(adapter: dict[str, tuple[Matrix, Matrix]]) -> dict[str, Any]:
    def checksum(values: Matrix) -> str:
        return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()

    return {
        name: {"rank": len(a), "A": checksum(a), "B": checksum(b)}
        for name, (a, b) in adapter.items()
    }


def change(
    before: dict[str, tuple[Matrix, Matrix]], round_number: int
) -> Iterator[tuple[str, Matrix]]:
    """Yield what the device's pattern in B does to each module's product B·A in a round."""
    for m, name in enumerate(sorted(MODULES)):
        a, b = before[name]
        drawn = directions(
            "rotating", job=JOB, device=DEVICE, round_number=round_number, rank=2, held=len(a)
        )
        rows = np.arange(len(b))[:, None] % 3 - 1
        delta = rows * (m + 1) * (np.array(drawn)[None] + 1) / 256
        yield name, (delta @ a[drawn]).astype(np.float32)


@pytest.mark.parametrize(
    ("mqtt", "up", "down", "killed", "factors"),
    [
        ("5", "bf16", "bf16", False, "both"),
        ("3.1.1", "int8", "f32", True, "both"),
        ("5", "f32", "int8", False, "both"),
        ("5", "f32", "f32", False, "alternating"),
    ],
)
def test_a_device_in_node_takes_part(
    tmp_path: Path,
    stack: ExitStack,
    node_device: Path,
    mqtt: str,
    up: str,
    down: str,
    killed: bool,
    factors: str,
) -> None:
    place, job = tmp_path / "fleet", tmp_path / "job.json"
    port, enrol_port = free_ports(2)
    ports = ["--port", port, "--enroll-port", enrol_port]
    aggregator("init", place, "--host", "localhost", "--bind", "127.0.0.1", *ports)
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1000, "modules": MODULES}
    rounds = 3 if factors == "alternating" else 2
    settings: dict[str, Any] = {"training": {"factors": factors}}
    settings["rule_settings"] = {"momentum": 0.0}  # each round moves by what the device sent
    settings |= {"rounds": rounds, "ladder": LADDER, "encoding_up": up, "encoding_down": down}
    job.write_text(json.dumps({"job": JOB, "base": base, **settings}))
    stack.enter_context(running_broker(FleetFolder(place)))
    serve = ["serve", job, "--dir", place, "--json", "--exit-when-done"]
    serving = stack.enter_context(Program("aggregator", serve, tmp_path, "aggregator"))
    serving.wait_for("serving")

    token = aggregator("enroll", DEVICE, "--dir", place)
    url = f"https://localhost:{enrol_port}"
    arguments = [url, token, tmp_path / "device", mqtt]

    def start() -> Program:
        made = Program(str(node_device), arguments, tmp_path, "device", runner=["node"])
        return stack.enter_context(made)

    device = start()
    assert device.wait_for("joined")["device"] == DEVICE
    serving.wait_for("enrolled", device=DEVICE)
    runs = [device]
    if killed:
        device.wait_for("offered")
        device.end(signal.SIGKILL)
        runs.append(device := start())
    device.wait_for("stopped", version=rounds + 1)
    assert device.wait() == 0, device.stderr
    assert serving.wait() == 0, serving.stderr

    counted = [(event["device"], event["round"]) for event in serving.of("counted")]
    assert counted == [(DEVICE, number + 1) for number in range(rounds)]
    merged = [(e["round"], e["version"], e["devices"]) for e in serving.of("merged")]
    assert merged == [(number + 1, number + 2, 1) for number in range(rounds)]
    assert serving.of("refused") == serving.of("rejected") == []
    said = [event for run in runs for event in run.events]
    assert not [event for event in said if event["event"] in ("refused", "reject")]
    asked = {i for event in said if event["event"] == "sent" for i in event["chunks"]}
    assert asked == {"f32": {0, 1, 2}, "bf16": {0, 1}, "int8": {0}}[up]
    sizes = [event["bytes"] for event in serving.of("counted")]
    assert (sizes[0] < sizes[1] / 10) == (factors == "alternating"), "B is small here, A large"

    state = place / "state" / JOB
    received = {e["version"]: e["modules"] for e in said if e["event"] == "version"}
    last = rounds + 1
    assert set(received) == set(range(1, last + 1))
    versions = {n: exported(state, tmp_path / f"version-{n}", n) for n in range(2, last + 1)}
    for number, adapter in versions.items():
        assert received[number] == checksums(adapter)
    if factors == "alternating":  # round 2 trains A, whose pattern is zero
        for name, (a0, b0) in versions[2].items():
            a1, b1 = versions[3][name]
            assert np.abs(b1 @ a1 - b0 @ a0).max() < 1e-3
    for name, expected in change(versions[rounds], rounds):
        (a0, b0), (a1, b1) = versions[rounds][name], versions[last][name]
        got = b1 @ a1 - b0 @ a0
        assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected), name
