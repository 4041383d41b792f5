"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from protocol.broker import free_port
from protocol.transport import BrokerAddress

# CI draws the same examples every time; elsewhere hypothesis goes on looking for new ones.
# An example may take its time on a busy machine: the tests as a whole have a limit.
hypothesis_settings.register_profile("here", deadline=None)
hypothesis_settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis_settings.load_profile("ci" if os.environ.get("CI") else "here")

# Debian and Homebrew put it where a user's PATH does not always lead.
MOSQUITTO = shutil.which("mosquitto") or shutil.which(
    "mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
)


@pytest.fixture(scope="session", autouse=True)
def no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep keys and states that a test names no folder for out of the home of who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        for name in ("TUNEFLEET_STATE", "TUNEFLEET_KEY"):
            patch.delenv(name, raising=False)
        yield


@contextmanager
def running_mosquitto(
    folder: Path, settings: str = "", *, port: int = 0, anonymous: bool = True
) -> Iterator[BrokerAddress]:
    """Run a mosquitto of one's own on a loopback port (0: a free one), with more settings."""
    address = BrokerAddress("127.0.0.1", port or free_port())
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / "mosquitto.conf", folder / "mosquitto.log"
    # Started as root it would become another user, who may not read pytest's folders.
    config.write_text(
        f"listener {address.port} {address.host}\npersistence false\n"
        f"allow_anonymous {str(anonymous).lower()}\n"
        f"user root\n{settings}\n"
    )
    with mosquitto_of(config, log, address.port):
        yield address


@contextmanager
def mosquitto_of(config: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run mosquitto on a configuration that has it listen on a loopback port."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with log.open("wb") as output:
        process = subprocess.Popen([MOSQUITTO, "-c", config], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"mosquitto did not start: {log.read_text()}")
                time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[BrokerAddress]:
    """Return the address of a mosquitto that this test has to itself."""
    with running_mosquitto(tmp_path / "mosquitto") as address:
        yield address


@pytest.fixture
def mosquitto_small(tmp_path: Path) -> Iterator[BrokerAddress]:
    """As `mosquitto`, with a packet limit of 4000 bytes that it tells its clients."""
    with running_mosquitto(tmp_path / "mosquitto", "max_packet_size 4000") as address:
        yield address


@pytest.fixture
def mosquitto_strict(tmp_path: Path) -> Iterator[BrokerAddress]:
    """As `mosquitto`, with a limit of 4000 bytes a message that it does not tell its clients."""
    with running_mosquitto(tmp_path / "mosquitto", "message_size_limit 4000") as address:
        yield address


@pytest.fixture
def mosquitto_read_only(tmp_path: Path) -> Iterator[BrokerAddress]:
    """As `mosquitto`, where clients may read everything and write below open/ alone."""
    rules = tmp_path / "acl"
    rules.write_text("topic read #\ntopic readwrite open/#\n")
    rules.chmod(0o644)
    with running_mosquitto(tmp_path / "mosquitto", f"acl_file {rules}") as address:
        yield address


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ray start one of its own, whatever this machine has, and take its time on a busy one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for patience in ("gcs_server_request_timeout_seconds", "worker_register_timeout_seconds"):
        monkeypatch.setenv(f"RAY_{patience}", "300")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else it waits for all else that runs here
