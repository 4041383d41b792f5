"""A base model comes from a hub: as its owner lets it, ended at any time, and counted."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import base_tiny
from device_profiles.schema import load_profile
from edge_client.backends import find_backends, missing_torch
from edge_client.config import Settings
from edge_client.equipping import Equipping
from edge_client.errors import ModelError
from edge_client.model import PARTIAL, model_hash
from edge_client.outbox import look
from protocol.events import EventLog
from protocol.messages import BaseModelInfo, Job
from protocol.patience import Waiting
from protocol.transport import BrokerAddress
from tests.faults.processes import Program

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing_torch()), reason=missing_torch()),
]
NAME = "me/tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 20
FILES = {
    path.name: path.read_bytes()
    for path in sorted(base_tiny.PATH.iterdir())
    if path.suffix in (".json", ".safetensors")
}
BIG = "large.txt"
FILES[BIG] = random.Random(0).randbytes(48 * PIECE)  # the hub's library writes 10 MiB at a time


class Hub(ThreadingHTTPServer):
    """A hub that has base-tiny; it gives `piece_s` for each piece of a large file, and counts."""

    daemon_threads = True
    piece_s = 0.0
    sent = 0
    asked_from: list[int]

    def handle_error(self, *_: object) -> None:
        """Say nothing of who has gone away."""


class Answering(BaseHTTPRequestHandler):
    """Answer as huggingface.co does, as far as a snapshot needs it."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_data=False)

    def do_GET(self) -> None:
        self._answer(with_data=True)

    def _answer(self, with_data: bool) -> None:
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in FILES]
            data = json.dumps({"id": NAME, "sha": REVISION, "siblings": siblings}).encode()
            self._head(200, data, {"Content-Type": "application/json"})
            self.wfile.write(data)
            return
        name = self.path.rpartition("/")[2]
        data = FILES[name]
        tag = hashlib.sha256(data).hexdigest()
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        more = {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if first:
            more["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._head(206 if first else 200, data[first:], more)
        if not with_data:
            return
        if name == BIG:
            self.server.asked_from.append(first)
        for start in range(first, len(data), PIECE):
            piece = data[start : start + PIECE]
            self.wfile.write(piece)
            self.wfile.flush()
            self.server.sent += len(piece)
            if name == BIG:
                time.sleep(self.server.piece_s)

    def _head(self, status: int, data: bytes, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**more, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Answering) as made:
        made.asked_from = []
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield made
        made.shutdown()


def job() -> Job:
    base = BaseModelInfo(
        name=NAME, sha256=model_hash(base_tiny.PATH), parameters=1000, modules={"q": (8, 8)}
    )
    return Job(job="notes", base=base, rounds=1, scale=2.0)


class Device:
    """What an agent does to be equipped."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            name="phone", broker=BrokerAddress("127.0.0.1", 1), data=(), state=folder,
            cache=folder, profile=load_profile("laptop-16gb"),
        )  # fmt: skip
        self.said, self.used = io.StringIO(), 0
        log = EventLog(as_json=True, stream=self.said)
        self.equipping = Equipping(self.settings, self._equip, log, Waiting(log), self._use)
        self._link: Any = None  # nothing of this comes over the link
        self.job = job()

    def _use(self, more: int) -> None:
        self.used += more

    def _equip(self, settings: Settings, job: Job) -> Any:
        return find_backends(settings, job, downloads=False)

    def go_on(self, until: Callable[[], object]) -> Any:
        """Ask for the equipment until it is there, or something else is."""
        while (ready := self.equipping.equipment(self.job, self._link, lambda: True)) is None:
            if until():
                return None
            time.sleep(0.05)
        return ready


def test_a_download_pauses_goes_on_and_is_counted(tmp_path: Path, hub: Hub) -> None:
    hub.piece_s = 0.2
    device = Device(tmp_path)
    assert device.equipping.needs == "train"
    assert device.equipping.equipment(device.job, device._link, lambda: True) is None
    assert (device.equipping.needs, hub.sent) == ("transfer", 0), "it asks before a byte is sent"

    assert device.go_on(lambda: device.used > 15 * PIECE) is None
    (event,) = [json.loads(line) for line in device.said.getvalue().splitlines()]
    assert (event["event"], event["state"], event["detail"]) == (
        "state", "downloading", f"the model {NAME}",
    )  # fmt: skip
    began = time.monotonic()
    device.equipping.pause()
    assert time.monotonic() - began < 2
    sent = hub.sent
    time.sleep(1)
    assert hub.sent <= sent + 4 * PIECE, "nothing comes meanwhile, but what was on its way"
    assert (tmp_path / PARTIAL).exists()

    hub.piece_s = 0.0
    other = Device(tmp_path)  # after a restart
    ready = other.go_on(lambda: False)
    assert model_hash(ready.folders["torch"]) == device.job.base.sha256
    assert hub.asked_from[-1] >= 10 * PIECE, "it goes on from what there is"
    whole = sum(map(len, FILES.values()))
    assert device.used + other.used == pytest.approx(whole, abs=16 * 4096)
    assert not (tmp_path / PARTIAL).exists()

    hub.shutdown()
    third = Device(tmp_path)
    assert third.go_on(lambda: True) is not None, "what is here is not asked for"
    assert third.equipping.needs == "train" and not third.said.getvalue()


def test_a_part_is_no_model_and_what_no_hub_has_is_said(tmp_path: Path, hub: Hub) -> None:
    Device(tmp_path).go_on(lambda: False)
    (tmp_path / PARTIAL).write_text(NAME)
    again = Device(tmp_path)
    assert again.go_on(lambda: again.equipping.needs == "transfer") is None
    again.go_on(lambda: False)

    asks = Device(tmp_path)
    base = asks.job.base.model_copy(update={"name": "me/nothing here"})
    asks.job = asks.job.model_copy(update={"base": base})
    with pytest.raises(ModelError, match="can't have a model of this name"):
        asks.go_on(lambda: False)


def test_an_agent_keeps_to_the_days_bytes_and_ends_while_it_downloads(
    tmp_path: Path, hub: Hub, mosquitto: BrokerAddress
) -> None:
    hub.piece_s = 0.2
    described = job()
    (tmp_path / "job.json").write_text(described.model_dump_json())
    (tmp_path / "notes.txt").write_text("Some text of its owner's. " * 500)
    (tmp_path / "cap.toml").write_text("mib_a_day = 10\n")
    serve = ["serve", tmp_path / "job.json", "--state", tmp_path / "server", "--json"]
    run = ["run", "--json", "--name", "phone", "--broker", mosquitto, "--job", "notes"]
    run += ["--data", tmp_path / "notes.txt", "--state", tmp_path / "phone"]
    run += ["--cache", tmp_path / "cache"]
    with Program("aggregator", [*serve, "--broker", mosquitto], tmp_path, "server") as server:
        server.wait_for("serving")
        held = [*run, "--policy", tmp_path / "cap.toml"]
        with Program("edge_client", held, tmp_path, "phone") as first:
            first.wait_for("state", state="downloading")
            assert "MiB" in first.wait_for("state", state="waiting")["detail"]
            first.end(signal.SIGTERM)
        used = look(tmp_path / "phone", datetime.now().date().isoformat()).bytes
        assert 10 * PIECE <= used < 48 * PIECE
        hub.piece_s = 5.0
        with Program("edge_client", run, tmp_path, "again") as second:
            second.wait_for("state", state="downloading")
            began = time.monotonic()
            second.end(signal.SIGINT)
            assert time.monotonic() - began < 20, "it does not wait for the hub"
