"""How fast an aggregator takes updates in, durably, beside a subscriber that only counts them.

    python -m benchmarks.ingest [--quick]

A fleet made by `aggregator init`: Mosquitto over TLS, `aggregator serve`, devices with outboxes and
certificates of their own. `mosquitto_sub` hears the same chunks of the same run and does nothing
but count. The base is described as SmolLM2-135M is; devices send random updates for it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from aggregator.enrol import ca
from aggregator.enrol.create import create_fleet
from aggregator.enrol.folder import FleetFolder, FleetSettings
from aggregator.enrol.server import EnrolmentServer
from benchmarks.claims import Claim, write_claims
from edge_client.join import join
from protocol import topics
from protocol.broker import free_ports
from protocol.events import EventLog
from protocol.files import write_durably
from protocol.messages import BaseModelInfo

COUNTER = "counter"
MEMORY_MIB = 256
RATIO = 0.5
TIMEOUT_S = 900.0
DEVICES_A_PROCESS = 250
"""A client has three files open, and paho waits for them with select(), which takes 1024."""


@dataclass(frozen=True, slots=True)
class Case:
    """A fleet: devices that are connected, those of them that upload at once, and their rank."""

    name: str
    connected: int
    uploading: int
    rank: int


@dataclass
class Found:
    """What one run of a case showed; times in seconds from the word to start."""

    chunk_bytes: int = 0
    counted: list[str] = field(default_factory=list)
    told_done: list[str] = field(default_factory=list)
    aggregator_s: float = 0.0
    subscriber_s: float = 0.0
    subscriber_bytes: int = 0
    peak_mib: float = 0.0

    @property
    def ratio(self) -> float:
        """The aggregator's rate as a share of the counting subscriber's."""
        return self.subscriber_s / self.aggregator_s


def smollm2_135m() -> BaseModelInfo:
    """Describe a model of that shape: 30 layers, width 576, 192 for keys and values, MLP 1536."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    wide = {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    modules = {
        f"model.layers.{layer}.{part}.{name}_proj": shape
        for layer in range(30)
        for part, group in (("self_attn", shapes), ("mlp", wide))
        for name, shape in group.items()
    }
    return BaseModelInfo(
        name="SmolLM2-135M's shape", sha256="0" * 64, parameters=134_515_008, modules=modules
    )


# -- the parts -------------------------------------------------------------------------------------


@contextmanager
def running(command: Sequence[object], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command of this benchmark's own."""
    process = subprocess.Popen([str(c) for c in command], text=True, **more)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def find_program(name: str) -> str:
    """Return where a program of Mosquitto's is."""
    found = shutil.which(name) or shutil.which(
        name, path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
    )
    if found is None:
        sys.exit(f"{name} is missing: install the packages mosquitto and mosquitto-clients")
    return found


def make_fleet(path: Path) -> FleetFolder:
    """Make a fleet on loopback, with a name for the counting subscriber among its clients."""
    port, enrol_port = free_ports(2)
    settings = FleetSettings(
        hosts=["localhost"], port=port, enrol_port=enrol_port, bind="127.0.0.1"
    )
    now = datetime.now(timezone.utc)
    fleet = create_fleet(path, settings, now)
    credentials = fleet.authority().client(COUNTER, now)
    write_durably(path / "counter.key", ca.key_pem(credentials.key))
    write_durably(path / "counter.pem", ca.pem(credentials.certificate))
    rules = (path / "acl").read_text()
    chunks = topics.subscription("upload_chunk")
    (path / "acl").write_text(f"user {COUNTER}\ntopic read {chunks}\n{rules}")
    return fleet


def join_all(fleet: FleetFolder, folder: Path, count: int) -> list[Path]:
    """Let devices in as their owners would; return their states."""
    states = [folder / f"device-{number}" for number in range(count)]
    now = datetime.now(timezone.utc)
    with EnrolmentServer(fleet, EventLog(as_json=True, stream=io.StringIO()), port=0) as server:
        for state in states:
            token = fleet.issue_token(state.name, hours=1, now=now)
            join(f"https://localhost:{server.port}", str(token), state)
    return states


@contextmanager
def running_broker(fleet: FleetFolder) -> Iterator[None]:
    """Run Mosquitto on the fleet's own configuration."""
    command = [find_program("mosquitto"), "-c", fleet.path / "mosquitto.conf"]
    with (fleet.path / "broker.log").open("w") as log, running(command, stderr=log):
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", fleet.port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    sys.exit(f"mosquitto did not start: {fleet.path / 'broker.log'}")
                time.sleep(0.05)
        yield


# -- one run ---------------------------------------------------------------------------------------


def run_case(case: Case, folder: Path) -> Found:
    """Run one case in a folder of its own."""
    folder.mkdir()
    fleet = make_fleet(folder / "fleet")
    model = folder / "model.json"
    model.write_text(smollm2_135m().model_dump_json())
    job = folder / "job.json"
    settings = {"job": "ingest", "model": str(model), "ladder": [case.rank], "rounds": 1}
    # One more than there are: what is measured is taking in, and not merging.
    policy = {"min_devices": case.uploading, "quorum": case.connected + 1, "deadline_s": 86400}
    job.write_text(
        json.dumps({**settings, "rule": "flexlora", "directions": "top", "policy": policy})
    )
    states = join_all(fleet, folder / "devices", case.connected)
    found = Found()
    with ExitStack() as stack:
        stack.enter_context(running_broker(fleet))
        aggregator = stack.enter_context(
            running(
                [
                    *(sys.executable, "-m", "aggregator", "serve", job, "--json"),
                    *("--dir", fleet.path, "--enroll-port", 0),
                ],
                stdout=subprocess.PIPE,
            )
        )
        wait_for(aggregator, '"serving"')
        subscriber = stack.enter_context(start_subscriber(fleet))
        publishers = [
            stack.enter_context(start_devices(case, model, part))
            for part in shares(states, case.uploading)
        ]
        for publisher, _ in publishers:
            wait_for(publisher, "ready")
        watch(case, found, aggregator, subscriber, publishers)
    return found


def shares(states: list[Path], uploading: int) -> list[tuple[list[Path], int]]:
    """Deal devices out to processes: each gets its share of those that upload."""
    processes = max(2, -(-len(states) // DEVICES_A_PROCESS))
    dealt = [states[number::processes] for number in range(processes)]
    return [(part, len(range(n, uploading, processes))) for n, part in enumerate(dealt)]


@contextmanager
def start_devices(
    case: Case, model: Path, part: tuple[list[Path], int]
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process of devices; yields it, and how many of them upload."""
    states, uploading = part
    command = [sys.executable, "-m", "benchmarks.ingest_devices", "--job", "ingest"]
    command += ["--model", str(model), "--rank", str(case.rank), "--uploading", str(uploading)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running([*command, *states], **pipes) as process:
        yield process, uploading


@contextmanager
def start_subscriber(fleet: FleetFolder) -> Iterator[subprocess.Popen[str]]:
    """Start `mosquitto_sub` on all chunks; it prints the length of each."""
    command = [find_program("mosquitto_sub"), "-h", "localhost", "-p", str(fleet.port)]
    command += ["--cafile", str(fleet.path / "ca.pem"), "--cert", str(fleet.path / "counter.pem")]
    command += ["--key", str(fleet.path / "counter.key"), "-V", "mqttv5", "-q", "1", "-F", "%l"]
    command += ["-t", topics.subscription("upload_chunk"), "-i", COUNTER]
    with running(command, stdout=subprocess.PIPE) as process:
        time.sleep(1)  # it doesn't say when it has subscribed; no device has begun before
        yield process


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Read a process's output up to a line with a word in it."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    sys.exit(f"{process.args!r} ended before it said {word}")


def watch(
    case: Case,
    found: Found,
    aggregator: subprocess.Popen[str],
    subscriber: subprocess.Popen[str],
    publishers: list[tuple[subprocess.Popen[str], int]],
) -> None:
    """Start the devices and listen to everybody until all is counted."""
    started = time.monotonic()

    def listen_aggregator() -> None:
        assert aggregator.stdout is not None
        for line in aggregator.stdout:
            event = json.loads(line)
            if event["event"] == "counted":
                found.counted.append(event["device"])
                found.chunk_bytes += event["bytes"]
                found.aggregator_s = time.monotonic() - started
            elif event["event"] in ("rejected", "refused", "undelivered"):
                print(f"{case.name}: {line}", end="", flush=True)

    def listen_subscriber() -> None:
        assert subscriber.stdout is not None
        for line in subscriber.stdout:
            found.subscriber_bytes += int(line)
            found.subscriber_s = time.monotonic() - started

    def listen_devices(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.told_done.append(json.loads(line)["done"])

    listening: list[Callable[[], None]] = [listen_aggregator, listen_subscriber]
    listening += [partial(listen_devices, process) for process, _ in publishers]
    for listen in listening:
        threading.Thread(target=listen, daemon=True).start()
    for process, _ in publishers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    memory = psutil.Process(aggregator.pid)
    while time.monotonic() - started < TIMEOUT_S:
        found.peak_mib = max(found.peak_mib, memory.memory_info().rss / 2**20)
        done = len(found.told_done) >= case.uploading and len(found.counted) >= case.uploading
        if done and found.subscriber_bytes >= found.chunk_bytes:
            return
        if aggregator.poll() is not None:
            sys.exit(f"{case.name}: the aggregator ended")
        time.sleep(0.02)
    print(f"{case.name}: not done within {TIMEOUT_S:.0f} s", flush=True)


# -- all of them -----------------------------------------------------------------------------------


def main() -> None:
    """Run the cases, print a table, write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller updates and fleets, once")
    quick = parser.parse_args().quick
    stream = Case("20 devices", 20, 20, 4 if quick else 16)
    crowd = Case("crowd", 100 if quick else 1000, 20 if quick else 100, 4)
    runs = []
    with tempfile.TemporaryDirectory(prefix="tunefleet-ingest-") as folder:
        for number in range(1 if quick else 3):
            runs.append((stream, run_case(stream, Path(folder) / f"stream-{number}")))
        runs.append((crowd, run_case(crowd, Path(folder) / "crowd")))
    print(f"{'case':12} connected uploading     MB  aggregator MB/s  subscriber MB/s  ratio    MiB")
    for case, found in runs:
        megabytes = found.chunk_bytes / 1e6
        print(
            f"{case.name:12} {case.connected:9} {case.uploading:9} {megabytes:6.1f} "
            f"{megabytes / found.aggregator_s:16.1f} {megabytes / found.subscriber_s:16.1f} "
            f"{found.ratio:6.2f} {found.peak_mib:6.0f}"
        )
    write_claims("ingest", make_claims(runs))


def make_claims(runs: list[tuple[Case, Found]]) -> list[Claim]:
    """Return what was asked of the runs, and what came out."""
    *streams, (crowd_case, crowd) = runs
    ratio = statistics.median(found.ratio for _, found in streams)
    peak_mib = max(found.peak_mib for _, found in runs)
    lost = sum(2 * c.uploading - len(set(f.counted)) - len(set(f.told_done)) for c, f in streams)
    lost_crowd = 2 * crowd_case.uploading - len(set(crowd.counted)) - len(set(crowd.told_done))
    crowd_words = f"{crowd_case.connected} connected, {crowd_case.uploading} uploading at once"
    return [
        Claim("durable ingest / mosquitto_sub counting, 20 devices", ratio, f"≥ {RATIO}",
              ratio >= RATIO),
        Claim("memory of the aggregator, MiB", peak_mib, f"≤ {MEMORY_MIB}", peak_mib <= MEMORY_MIB),
        Claim("updates lost, 20 devices", float(lost), "0", lost == 0),
        Claim(f"updates lost, {crowd_words}", float(lost_crowd), "0", lost_crowd == 0),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
