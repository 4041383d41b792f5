"""An enrolled device fills the broker with retained messages; the aggregator takes them away."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from paho.mqtt.properties import VariableByteIntegers

from aggregator.enrol.broker_config import QUEUED_MESSAGES
from aggregator.store import Store
from protocol import topics
from protocol.errors import TransportError
from protocol.messages import Job
from protocol.tls import TlsFiles
from protocol.transport import MqttTransport
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import make_job
from tests.conftest import running_mosquitto
from tests.faults.processes import PATIENCE_S, Program
from tests.security.fleet import LEAVES_SOCKET, Fleet

pytestmark = [pytest.mark.timeout(180), LEAVES_SOCKET]
JOB = make_job(ladder=[2, 4], rounds=1)
MIB = 1 << 20
GROWTH_MIB = 100
"""Of the aggregator, while 312 MiB come."""


@contextmanager
def serving(fleet: Fleet, folder: Path, job: Job = JOB) -> Iterator[Program]:
    file = folder / "notes.json"
    file.write_text(job.model_dump_json())
    arguments = ["serve", file, "--dir", fleet.folder.path, "--enroll-port", "0", "--json"]
    with Program("aggregator", arguments, folder, "aggregator") as program:
        program.wait_for("serving")
        yield program


def flood(link: MqttTransport, device: str, count: int, size: int = 1) -> None:
    """Retain messages under uploads and statuses: of the job, of others, and of what is no job."""
    names = []
    for number in range(count // 5):
        upload, job = f"{number:032x}", f"made-up-{number}"
        names += [
            f"tunefleet/1/notes/d/{device}/up/{upload}/0",
            f"tunefleet/1/notes/d/{device}/up/{upload}/manifest",
            f"tunefleet/1/{job}/d/{device}/up/{upload}/0",
            f"tunefleet/1/NO JOB {number}/d/{device}/up/what ever/it is",
            f"tunefleet/1/{job}/d/{device}/status",
        ]
    said = link.publish_all([(name, bytes(size)) for name in names], retain=True)
    assert not any(delivery.refused for delivery in said)


class Watcher:
    """Look at what the broker retains on a device's topics, as no device may."""

    def __init__(self, fleet: Fleet) -> None:
        files = fleet.join("watcher")
        rules = fleet.folder.path / "acl"
        rules.write_text(rules.read_text() + "user watcher\ntopic read tunefleet/#\n")
        assert fleet.folder.reload_broker()
        self._look = lambda: fleet.link(files, "watcher", temporary=True)

    def kept(self, device: str) -> list[str]:
        link = self._look()
        link.subscribe([topics.subscription(kind) for kind in ("status", "upload_chunk")])
        found = set()
        while (incoming := link.receive(0.5)) is not None:
            link.ack(incoming)
            if incoming.retained and f"/d/{device}/" in incoming.topic:
                found.add(incoming.topic)
        link.close()
        return sorted(found)


def test_what_a_device_leaves_on_the_broker_is_cleared_while_others_take_part(
    fleet: Fleet, tmp_path: Path
) -> None:
    hostile, watcher = fleet.link(fleet.join("hostile"), "hostile"), Watcher(fleet)
    files, broker = fleet.join("kitchen"), fleet.folder.broker_for_devices
    with serving(fleet, tmp_path) as aggregator:
        process = psutil.Process(aggregator.process.pid)
        before = process.memory_info().rss
        place = fleet.devices / "kitchen"
        kitchen = LightDevice(broker, place, "kitchen", JOB, lambda now: 1e-3, tls=files)
        fleet.stack.callback(kitchen.close)
        flooding = threading.Thread(target=flood, args=(hostile, "hostile", 5000, 64 * 1024))
        flooding.start()
        run_until(lambda: bool(aggregator.of("merged")), kitchen)
        flooding.join()
        run_until(lambda: not watcher.kept("hostile"), kitchen)
        assert [e["device"] for e in aggregator.of("counted")] == ["kitchen"]
        swept = aggregator.of("swept")
        assert 1 <= len(swept) <= 5 and {e["device"] for e in swept} == {"hostile"}
        assert (process.memory_info().rss - before) / MIB < GROWTH_MIB
    assert watcher.kept("kitchen") == [topics.topic("status", job="notes", device="kitchen")]


def test_what_was_left_while_the_aggregator_was_away_is_cleared(
    fleet: Fleet, tmp_path: Path
) -> None:
    """More than the broker's queue holds; statuses in jobs of the fleet stay."""
    files, watcher = fleet.join("hostile"), Watcher(fleet)
    with serving(fleet, tmp_path):
        pass  # the broker keeps a session for it from now on
    Store(fleet.folder.state("letters")).close()
    hostile = fleet.link(files, "hostile")
    flood(hostile, "hostile", QUEUED_MESSAGES + 2000)
    mine = [topics.topic("status", job=job, device="hostile") for job in ("letters", "notes")]
    assert not any(d.refused for d in hostile.publish_all([(t, b"x") for t in mine], retain=True))
    with serving(fleet, tmp_path) as aggregator:
        deadline = time.monotonic() + PATIENCE_S
        while watcher.kept("hostile") != mine:
            assert time.monotonic() < deadline
        assert 1 <= len(aggregator.of("swept")) <= 3


def test_a_device_that_was_revoked_leaves_nothing(fleet: Fleet, tmp_path: Path) -> None:
    files, watcher = fleet.join("hostile"), Watcher(fleet)
    status = topics.topic("status", job="notes", device="hostile")
    fleet.link(files, "hostile").publish(status, b"x", retain=True).check()
    fleet.folder.revoke("hostile", fleet.clock())
    with serving(fleet, tmp_path) as aggregator:
        assert aggregator.wait_for("swept")["device"] == ""
        assert watcher.kept("hostile") == []


def test_jobs_of_others_on_a_broker_without_certificates_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text(JOB.model_dump_json())
    names = [
        topics.topic("status", job="letters", device="desk"),
        topics.topic("upload_chunk", job="letters", device="desk", upload="0" * 32, index=0),
        topics.topic("upload_chunk", job="notes", device="desk", upload="0" * 32, index=0),
    ]
    with running_mosquitto(tmp_path / "mosquitto") as broker, ExitStack() as stack:
        desk = MqttTransport(broker, "desk")
        stack.callback(desk.close)
        desk.connect()
        arguments = ["serve", file, "--broker", broker, "--state", tmp_path / "state", "--json"]
        aggregator = stack.enter_context(Program("aggregator", arguments, tmp_path, "aggregator"))
        aggregator.wait_for("serving")
        assert not any(d.refused for d in desk.publish_all([(n, b"x") for n in names], retain=True))
        time.sleep(1)
        desk.subscribe(["tunefleet/1/+/d/#"])
        found = set()
        while (incoming := desk.receive(0.5)) is not None:
            desk.ack(incoming)
            found.add(incoming.topic)
        assert found == set(names)
        assert not aggregator.of("swept")


def test_at_its_memory_limit_mosquitto_hangs_up_and_goes_on(tmp_path: Path) -> None:
    """It takes no more, from whom ever, and is there again for who clears by name."""
    with running_mosquitto(tmp_path / "mosquitto", "memory_limit 20000000") as broker:
        hostile, other = MqttTransport(broker, "hostile"), MqttTransport(broker, "other")
        hostile.connect()
        names = [f"t/{number}" for number in range(400)]
        with pytest.raises(TransportError):
            hostile.publish_all([(name, bytes(100_000)) for name in names], retain=True)
        hostile.close()
        other.connect()
        cleared = other.publish_all([(name, b"") for name in names], retain=True)
        assert not any(delivery.refused for delivery in cleared)
        other.publish("t/small", bytes(100_000)).check()
        other.close()


class Blast:
    """Send chunks that nobody expects, QoS 0, so many a second, until it ends."""

    def __init__(self, fleet: Fleet, files: TlsFiles, device: str, rate: float) -> None:
        self._rate = rate
        self._ending = threading.Event()
        raw = socket.create_connection(("localhost", fleet.folder.port))
        self._socket = files.context().wrap_socket(raw, server_hostname="localhost")
        connect = b"\0\4MQTT\5\2\0\0\0" + b"\0\1x"
        self._socket.sendall(bytes([0x10, len(connect)]) + connect)
        assert self._socket.recv(200)[0] == 0x20, "CONNACK"
        names = [f"tunefleet/1/notes/d/{device}/up/{n:032x}/0".encode() for n in range(50)]
        bodies = [len(name).to_bytes(2, "big") + name + b"\0x" for name in names]
        self._packets = b"".join(bytes([0x30, len(body)]) + body for body in bodies)
        self._thread = threading.Thread(target=self._run, args=(len(names),))
        self._thread.start()

    def _run(self, at_once: int) -> None:
        began, sent = time.monotonic(), 0
        while not self._ending.is_set():
            self._socket.sendall(self._packets)
            sent += at_once
            time.sleep(max(0.0, began + sent / self._rate - time.monotonic()))

    def end(self) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()


def test_rounds_go_on_through_a_flood_of_chunks_that_nobody_expects(
    fleet: Fleet, tmp_path: Path
) -> None:
    """At first as many as the broker can pass on, then more: it drops answers and good chunks."""
    hostile, files = fleet.join("hostile"), fleet.join("kitchen")
    job, broker = make_job(ladder=[2, 4], rounds=1000), fleet.folder.broker_for_devices
    with serving(fleet, tmp_path, job) as aggregator:
        place = fleet.devices / "kitchen"
        kitchen = LightDevice(broker, place, "kitchen", job, lambda now: 1e-3, tls=files)
        fleet.stack.callback(kitchen.close)
        blast = Blast(fleet, hostile, "hostile", 8000)
        run_until(lambda: len(aggregator.of("merged")) >= 2, kitchen)
        blast.end()
        blast = Blast(fleet, hostile, "hostile", 50_000)
        until = time.monotonic() + 3
        run_until(lambda: time.monotonic() > until, kitchen)
        blast.end()
        before = len(aggregator.of("merged"))
        run_until(lambda: len(aggregator.of("merged")) >= before + 2, kitchen)
        (told,) = aggregator.of("flooding")
        assert told["device"] == "hostile"
    assert "being dropped for client _aggregator" in (fleet.folder.path / "broker/log").read_text()


def test_properties_without_end_hold_nobody_up(fleet: Fleet) -> None:
    """A megabyte of MQTT 5 user properties, written by hand: no client library sends as many."""
    files, broker = fleet.join("evil"), fleet.folder.broker_for_devices
    aggregator = fleet.aggregator()
    aggregator.subscribe([topics.subscription("status")])
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)

    def packet(kind: int, body: bytes) -> bytes:
        return bytes([kind]) + VariableByteIntegers.encode(len(body)) + body

    def text(value: str) -> bytes:
        return len(value).to_bytes(2, "big") + value.encode()

    with (
        socket.create_connection((broker.host, broker.port)) as plain,
        context.wrap_socket(plain, server_hostname=broker.host) as secure,
    ):
        version_5, clean_start, keepalive, no_properties = b"\x05", b"\x02", b"\x00\x3c", b"\x00"
        head = text("MQTT") + version_5 + clean_start + keepalive + no_properties
        secure.sendall(packet(0x10, head + text("evil")))
        assert secure.recv(100)[:1] == b"\x20", "CONNACK"
        topic = text(topics.topic("status", job="notes", device="evil"))
        for payload, count in ((b"long", 200_000), (b"after", 0)):
            properties = b"\x26\x00\x00\x00\x00" * count
            length = VariableByteIntegers.encode(len(properties))
            secure.sendall(packet(0x30, topic + length + properties + payload))
        for payload in (b"long", b"after"):
            incoming = aggregator.receive(5)
            assert incoming is not None and incoming.payload == payload
