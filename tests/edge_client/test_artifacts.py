"""A device fetches its job's artifact set over a real broker, past kills, caps and forgers."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from aggregator.artifacts import open_set, topics_of
from device_profiles.schema import load_profile
from edge_client import backends
from edge_client.artifacts import WINDOW, ArtifactFetch
from edge_client.backends import find_backends
from edge_client.config import Settings
from edge_client.equipping import PATIENCE_TICKS, Equipping
from edge_client.errors import ArtifactWanted, ModelError
from edge_client.ort.runtime import missing_training
from edge_client.outbox import look
from protocol import topics
from protocol.artifact import ALL_FILES, WEIGHTS
from protocol.chunks import CHUNK_BYTES
from protocol.errors import BadChunk, BadSignature
from protocol.events import EventLog
from protocol.patience import Waiting
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.made_set import write_set
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
JOB = make_job()
KEY = SigningKey.generate()
MANIFEST_TOPIC = topics.topic("onnx_manifest", job=JOB.job)
Connect = Callable[[str], MqttTransport]


@pytest.fixture
def connect(mosquitto: BrokerAddress) -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(client_id: str) -> MqttTransport:
            link = MqttTransport(mosquitto, client_id, temporary=True)
            stack.callback(link.close)
            link.connect()
            return link

        yield make


def publish(link: MqttTransport, folder: Path, key: SigningKey = KEY) -> dict[str, bytes]:
    """Put a set on the broker, and return its chunks by topic."""
    manifest = open_set(folder, JOB)
    chunks = {}
    for name, info in manifest.files.items():
        data, place = (folder / name).read_bytes(), {"artifact": manifest.artifact, "file": name}
        for index in range(len(info.chunks)):
            topic = topics.topic("onnx_chunk", job=JOB.job, **place, index=index)
            chunks[topic] = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
    sealed = key.seal(manifest, MANIFEST_TOPIC)
    for delivery in link.publish_all([*chunks.items(), (MANIFEST_TOPIC, sealed)], retain=True):
        delivery.check()
    return chunks


def settings_of(folder: Path, broker: BrokerAddress, name: str = "phone") -> Settings:
    return Settings(
        name=name,
        broker=broker,
        data=(),
        state=folder / "state",
        cache=folder / "cache",
        profile=load_profile("laptop-16gb"),
    )


class Device:
    """A device that fetches, and counts what it asks its owner."""

    def __init__(self, folder: Path, link: MqttTransport, name: str = "phone") -> None:
        self.link, self.may, self.said = link, True, io.StringIO()
        self.settings = settings_of(folder, link.address, name)
        log = EventLog(as_json=True, stream=self.said)
        self.fetch = ArtifactFetch(JOB, self.settings, link, log, lambda: self.may)
        self.fetch.begin()

    def run(self, *, until: Callable[[], bool] = bool, seconds: float = 20.0) -> Path | None:
        """Take what comes until the set is there, or something else."""
        deadline = time.monotonic() + seconds
        while self.fetch.folder is None and not until() and time.monotonic() < deadline:
            incoming = self.link.receive(0.2)
            if incoming is None:
                self.fetch.go_on()
            elif incoming.payload:
                self.link.ack(incoming)
                self.fetch.take(topics.match(incoming.topic), incoming)
        return self.fetch.folder

    @property
    def there(self) -> int:
        """Return the bytes of the set that are on disk."""
        files = self.settings.cache.glob("onnx/*.part/*")
        return sum(file.stat().st_size for file in files)


def assert_same(folder: Path | None, source: Path) -> None:
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == sorted(ALL_FILES)
    for name in ALL_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_a_set_is_fetched_once_and_kept_by_its_hash(tmp_path: Path, connect: Connect) -> None:
    source = write_set(tmp_path / "set", JOB)
    publish(connect("test-aggregator"), source)
    device = Device(tmp_path, connect("test-phone"))
    found = device.run()
    assert_same(found, source)
    assert found is not None and found.name == open_set(source, JOB).artifact
    size = sum((source / name).stat().st_size for name in ALL_FILES)
    assert size < device.link.bytes_received < size + 10_000
    again = Device(tmp_path, connect("test-phone-again"))
    assert again.run() == found
    assert again.link.bytes_received < 10_000, "its manifest alone"
    with (found / WEIGHTS).open("r+b") as file:
        file.write(b"damaged")
    assert_same(Device(tmp_path, connect("test-phone-then")).run(), source)


def test_it_stops_when_the_owner_says_so_and_goes_on_from_there(
    tmp_path: Path, connect: Connect
) -> None:
    source = write_set(tmp_path / "set", JOB)
    publish(connect("test-aggregator"), source)
    device = Device(tmp_path, connect("test-phone"))
    device.run(until=lambda: device.there > 0)
    device.may = False
    assert device.run(seconds=1.0) is None
    assert 0 < device.there <= 2 * WINDOW * CHUNK_BYTES
    device.link.close()
    there = device.there
    (part,) = device.settings.cache.glob(f"onnx/*.part/{WEIGHTS}")
    with part.open("ab") as file:  # as after a power cut
        file.write(bytes(1000))
    again = Device(tmp_path, connect("test-phone-again"))
    assert_same(again.run(), source)
    size = sum((source / name).stat().st_size for name in ALL_FILES)
    assert again.link.bytes_received < size - there + 10_000


def test_an_altered_chunk_is_refused_and_the_right_one_still_taken(
    tmp_path: Path, connect: Connect
) -> None:
    source = write_set(tmp_path / "set", JOB)
    aggregator = connect("test-aggregator")
    chunks = publish(aggregator, source)
    (bad,) = (topic for topic in chunks if topic.endswith(f"{WEIGHTS}/3"))
    aggregator.publish(bad, random.Random(1).randbytes(CHUNK_BYTES), retain=True).check()
    device = Device(tmp_path, connect("test-phone"))
    with pytest.raises(BadChunk, match="chunk 3"):
        device.run()
    assert device.run(seconds=1.0) is None
    assert not list((tmp_path / "cache" / "onnx").glob("[0-9a-f]" * 32))
    aggregator.publish(bad, chunks[bad], retain=True).check()
    assert_same(device.run(), source)


def test_a_forged_manifest_is_not_followed(tmp_path: Path, connect: Connect) -> None:
    aggregator = connect("test-aggregator")
    publish(aggregator, write_set(tmp_path / "good", JOB))
    device = Device(tmp_path, connect("test-phone"))
    device.run(until=lambda: device.fetch.manifest is not None)
    publish(aggregator, write_set(tmp_path / "forged", JOB, seed=1), SigningKey.generate())
    with pytest.raises(BadSignature):
        device.run()
    assert_same(device.run(), tmp_path / "good")


def test_a_set_of_another_base_is_refused_before_it_is_fetched(
    tmp_path: Path, connect: Connect
) -> None:
    link = connect("test-aggregator")
    manifest = open_set(write_set(tmp_path / "set", JOB), JOB)
    other = manifest.model_copy(update={"base_sha256": "1" * 64})
    link.publish(MANIFEST_TOPIC, KEY.seal(other, MANIFEST_TOPIC), retain=True).check()
    device = Device(tmp_path, connect("test-phone"))
    with pytest.raises(ModelError, match=r"of another base \(hash 111111111111…\) than its own"):
        device.run()
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_files_that_are_not_the_sets_are_thrown_away(tmp_path: Path, connect: Connect) -> None:
    """An aggregator that announces what is no set of the job's base comes to nothing."""
    folder = write_set(tmp_path / "set", JOB)
    manifest = open_set(folder, JOB)
    (folder / "manifest.json").write_text("{}")
    lying = open_lying(folder, manifest)
    link = connect("test-aggregator")
    for topic in topics_of(lying)[1:]:
        found = topics.match(topic).fields
        index = int(found["index"])
        data = (folder / found["file"]).read_bytes()
        piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        link.publish(topic, piece, retain=True).check()
    link.publish(MANIFEST_TOPIC, KEY.seal(lying, MANIFEST_TOPIC), retain=True).check()
    with pytest.raises(ModelError, match=r"is not what its manifest\.json says"):
        Device(tmp_path, connect("test-phone")).run()
    assert list((tmp_path / "cache" / "onnx").iterdir()) == []


def open_lying(folder: Path, manifest: Any) -> Any:
    from protocol.messages import ArtifactFile, describe_file

    text = (folder / "manifest.json").read_bytes()
    file = ArtifactFile.model_validate(describe_file(text).model_dump())
    return manifest.model_copy(update={"files": {**manifest.files, "manifest.json": file}})


def test_who_has_all_it_takes_asks_for_nothing_and_who_waits_is_told_for_what(
    tmp_path: Path, connect: Connect
) -> None:
    publish(connect("test-aggregator"), write_set(tmp_path / "set", JOB))
    device = Device(tmp_path, connect("test-phone"))
    said = io.StringIO()
    log = EventLog(as_json=True, stream=said)
    link = connect("test-laptop")
    ready: Any = object()
    used: list[int] = []
    equipping = Equipping(device.settings, lambda *_: ready, log, Waiting(log), used.append)
    assert equipping.equipment(JOB, link, lambda: True) is ready
    assert (equipping.needs, link.receive(0.5), link.bytes_received) == ("train", None, 0)

    def lacks(settings: Settings, _: object) -> Any:
        if settings.onnx is None:
            raise ArtifactWanted("a set")
        return settings.onnx

    connect("test-withdraw").publish(MANIFEST_TOPIC, b"", retain=True).check()
    for waits in (True, False):
        settings = replace(device.settings, wait_for_broker=waits)
        equipping = Equipping(settings, lacks, log, Waiting(log), used.append)
        for _ in range(PATIENCE_TICKS):
            assert equipping.equipment(JOB, link, lambda: True) is None
        if waits:
            assert equipping.equipment(JOB, link, lambda: True) is None
            assert "aggregator serve --onnx" in json.loads(said.getvalue())["why"]
        else:
            with pytest.raises(ArtifactWanted, match="offers none so far"):
                equipping.equipment(JOB, link, lambda: True)


def test_of_two_devices_with_one_cache_the_second_leaves_the_firsts_set_alone(
    tmp_path: Path, connect: Connect
) -> None:
    source = write_set(tmp_path / "set", JOB)
    publish(connect("test-aggregator"), source)
    second = Device(tmp_path, connect("test-second"), "second")
    second.run(until=lambda: second.there > 0)
    found = Device(tmp_path, connect("test-first"), "first").run()
    assert found is not None
    before = found.stat().st_ino
    assert second.run() == found
    assert found.stat().st_ino == before, "it may be training from it"
    assert_same(found, source)
    assert [path.name for path in found.parent.iterdir()] == [found.name], "no part is left"


def test_a_set_that_another_job_left_is_used_while_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "missing_training", lambda: "")
    settings = replace(settings_of(tmp_path, BrokerAddress("localhost", 1883)), backend="onnx")
    other = JOB.model_copy(
        update={"base": JOB.base.model_copy(update={"sha256": "1" * 64, "name": "other"})}
    )
    for job, name in ((other, "0" * 32), (JOB, "1" * 32)):
        write_set(settings.cache / "onnx" / name, job)
    found = settings.cache / "onnx" / ("1" * 32)
    assert find_backends(settings, JOB).folders == {"onnx": found}
    (found / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ArtifactWanted):
        find_backends(settings, JOB)


def test_a_set_that_is_not_there_is_told_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Some text of its owner's. " * 500)
    for command in ("run", "install-service"):
        arguments = [command, "--data", tmp_path / "notes.txt", "--state", tmp_path / "state"]
        arguments += ["--profile", "laptop-16gb", "--broker", "mqtt://localhost:1"]
        arguments += ["--onnx", tmp_path / "nosuch"]
        ended = subprocess.run(
            [sys.executable, "-m", "edge_client", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
        assert "can't read" in ended.stderr and "nosuch/manifest.json" in ended.stderr


@pytest.mark.skipif(bool(missing_training()), reason=missing_training())
def test_a_killed_device_goes_on_and_its_owner_pays_for_each_byte_once(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    """As processes: the daily cap holds a fetch up, a kill does not begin it anew."""
    source = write_set(tmp_path / "set", JOB, chunks=400)
    (tmp_path / "job.json").write_text(JOB.model_dump_json())
    (tmp_path / "notes.txt").write_text("Some text of its owner's. " * 500)
    (tmp_path / "cap.toml").write_text("mib_a_day = 10\n")
    serve = ["serve", tmp_path / "job.json", "--state", tmp_path / "server", "--json"]
    serve += ["--broker", mosquitto, "--onnx", source]
    run = ["run", "--json", "--name", "phone", "--backend", "onnx", "--broker", mosquitto]
    run += ["--data", tmp_path / "notes.txt", "--state", tmp_path / "phone"]
    run += ["--cache", tmp_path / "cache", "--job", JOB.job]
    with ExitStack() as stack:

        def start(module: str, arguments: list[Any]) -> Program:
            return stack.enter_context(Program(module, arguments, tmp_path, module))

        start("aggregator", serve).wait_for("onnx", state="published")
        first = start("edge_client", [*run, "--policy", tmp_path / "cap.toml"])
        first.wait_for("onnx", state="fetching")
        assert "10" in first.wait_for("state", state="waiting")["detail"]
        first.end(signal.SIGTERM)
        used = look(tmp_path / "phone", datetime.now().date().isoformat()).bytes
        assert 10 * 2**20 <= used < 10 * 2**20 + 2 * WINDOW * CHUNK_BYTES
        (part,) = (tmp_path / "cache").glob(f"onnx/*.phone.part/{WEIGHTS}")
        second = start("edge_client", run)
        second.wait_for("onnx", state="fetching")
        there = part.stat().st_size
        while part.exists() and part.stat().st_size < there + 4 * 2**20:
            time.sleep(0.005)
        second.end(signal.SIGKILL, group=True)
        assert part.exists(), "it was not in the middle"
        there = part.stat().st_size // CHUNK_BYTES * CHUNK_BYTES
        third = start("edge_client", run)
        assert third.wait_for("onnx", state="fetching")["there"] >= there > 13 * 2**20
        third.wait_for("onnx", state="fetched")
    assert_same(tmp_path / "cache" / "onnx" / open_set(source, JOB).artifact, source)
