"""The broker of a replay: Mosquitto, with its limits raised.

Not the embedded one: it now and then hangs up on who subscribes and publishes at once. A device
gets over that by connecting again; a replay that is to be the same each time can't.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from device_profiles.errors import ReplayError
from protocol.broker import free_port
from protocol.errors import TunefleetError
from protocol.lifeline import lifeline
from protocol.link import BrokerAddress

PLACES = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
"""Where Debian and Homebrew put it, which a user's PATH does not always have."""
SPARE_FILES = 200
START_S, END_S = 20.0, 5.0


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker, and its process where it is one of its own."""

    address: BrokerAddress
    pid: int | None
    kind: str


def find_mosquitto() -> str | None:
    """Return where Mosquitto is, if it is installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=PLACES)


@contextmanager
def running_broker(url: str, folder: Path, devices: int) -> Iterator[RunningBroker]:
    """Run a broker for so many devices on a free port of loopback, or use the one at a URL.

    Raises:
        ReplayError: it is not there, can't be started, or this system allows too few connections.
        TransportError: the URL is none of a broker.
    """
    allow_files(devices)
    if url:
        yield RunningBroker(BrokerAddress.parse(url), None, "given")
        return
    program = find_mosquitto()
    if program is None:
        raise ReplayError(
            "a replay of traces needs Mosquitto: install it (apt install mosquitto), or name a "
            "broker with --broker"
        )
    with _mosquitto(program, folder) as running:
        yield running


def allow_files(devices: int) -> None:
    """Let this process, and the broker that it starts, have a connection for each device.

    Raises:
        ReplayError: the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = devices + SPARE_FILES
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ReplayError(
            f"{devices} devices need {wanted} open files, this system allows {hard}: raise it "
            f"(ulimit -Hn {wanted}, as root), or replay fewer devices"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _mosquitto(program: str, folder: Path) -> Iterator[RunningBroker]:
    address = BrokerAddress("127.0.0.1", free_port(), version="5")
    folder.mkdir(parents=True, exist_ok=True)
    settings, log = folder / "mosquitto.conf", folder / "mosquitto.log"
    lines = [
        f"listener {address.port} {address.host}",
        "persistence false",
        "allow_anonymous true",
        "max_inflight_messages 0",
        "max_queued_messages 0",
        "set_tcp_nodelay true",
        "sys_interval 0",
        "connection_messages false",
    ]
    if os.geteuid() == 0:  # it would become another user, who may not read this folder
        lines.append("user root")
    settings.write_text("\n".join([*lines, ""]))
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-c", settings], stdout=output, stderr=output)
    # Mosquitto does not look whether its parent lives: a shell does, and ends it after a kill.
    watch = subprocess.Popen(["sh", "-c", f"read -r _; kill {process.pid}"], stdin=lifeline())
    try:
        _wait(process, address, log)
        try:
            yield RunningBroker(address, process.pid, "mosquitto")
        except TunefleetError:
            if _has_ended(process):  # whatever else went wrong went wrong for that
                raise ReplayError(f"Mosquitto has ended; its log is {log}") from None
            raise
    finally:
        watch.kill()
        watch.wait()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        if process.poll() is None:
            process.kill()
            process.wait()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Say whether it has, or is about to: its connections end a moment before it does."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    return process.poll() is not None


def _wait(process: subprocess.Popen[bytes], address: BrokerAddress, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection((address.host, address.port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ReplayError(
                    f"Mosquitto did not start; it says in {log}: {log.read_text()[-500:]}"
                ) from None
            time.sleep(0.02)
