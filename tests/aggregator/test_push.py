"""An export is copied to a URL, or to a hub: here one of our own, asked by the hub's client."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aggregator.errors import PushError
from aggregator.export import FILES
from aggregator.push import push
from tests.aggregator.uploading import Aggregator, make_job

NAME, TOKEN = "me/notes", "hf_right"


class Hub(ThreadingHTTPServer):
    """A hub that keeps what is committed to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.message = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    """Answer as huggingface.co does, as far as an upload of small files needs it."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._say(200, {"id": NAME, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        body = self.rfile.read(length)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
        elif self.path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._say(200, {"url": f"{self.server.url}/{NAME}"})
        elif self.path.startswith(f"/api/models/{NAME}/preupload/"):
            named = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in named]
            self._say(200, {"files": files})
        elif self.path.startswith(f"/api/models/{NAME}/commit/"):
            self._keep(body)
            commit = {"commitUrl": f"{self.server.url}/{NAME}/commit/1", "commitOid": "1"}
            self._say(200, commit | {"success": True, "pullRequestUrl": None})
        else:
            self._say(404, {"error": f"no {self.path}"})

    def _keep(self, body: bytes) -> None:
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "header":
                self.server.message = told["value"]["summary"]
            if told["key"] == "file":
                file = told["value"]
                self.server.files[file["path"]] = base64.b64decode(file["content"])

    def _say(self, status: int, what: object) -> None:
        data = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    Aggregator(tmp_path / "state", make_job()).store.close()
    return tmp_path / "state"


def export(state: Path, target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Export in a process of its own: the hub's client reads its environment once."""
    command = [sys.executable, "-m", "aggregator", "export", str(state.parent / "adapter")]
    command += ["--state", str(state), "--push", target]
    known = {"PATH": "/usr/bin:/bin", "HOME": str(state.parent), "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=known | environment
    )


def test_an_export_is_committed_to_a_private_repository_of_a_hub(state: Path, hub: Hub) -> None:
    done = export(state, NAME, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"it is at {hub.url}/{NAME}/commit/1 too" in done.stdout
    assert hub.created["private"] is True
    assert (hub.created["organization"], hub.created["name"]) == ("me", "notes")
    assert hub.message == "Version 1"
    wrote = {name: (state.parent / "adapter" / name).read_bytes() for name in FILES}
    assert hub.files == wrote


def test_who_may_not_write_is_told_what_to_do(state: Path, hub: Hub) -> None:
    done = export(state, NAME, HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
    assert done.returncode == 1
    assert "error: the hub refuses me/notes: " in done.stderr
    assert "set HF_TOKEN to a token that may write there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_is_away_is_said(state: Path) -> None:
    done = export(state, NAME, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "error: can't reach the hub for me/notes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_export_is_copied_to_a_url(state: Path, tmp_path: Path) -> None:
    done = export(state, f"file://{tmp_path}/there/notes")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        here, there = tmp_path / "adapter" / name, tmp_path / "there/notes" / name
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere", r"neither a hub's id \(owner/name\) nor a URL"),
        ("nosuch://bucket/folder", "can't push to nosuch://.*nosuch"),
        ("file:///proc/none", "can't push to file:///proc/none"),
    ],
)
def test_what_is_no_place_is_refused(tmp_path: Path, target: str, said: str) -> None:
    (tmp_path / "file").write_text("a")
    with pytest.raises(PushError, match=said):
        push(tmp_path, target, message="")
