"""A fleet of this test's own: its folder, a real Mosquitto with its settings, its enrolment."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from aggregator.enrol.broker_config import AGGREGATOR
from aggregator.enrol.create import create_fleet
from aggregator.enrol.folder import FleetFolder, FleetSettings
from aggregator.enrol.server import EnrolmentServer
from edge_client.join import join
from edge_client.membership import tls_files
from protocol.broker import free_ports
from protocol.events import EventLog
from protocol.tls import TlsFiles
from protocol.transport import MqttTransport
from tests.conftest import mosquitto_of

LEAVES_SOCKET = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <ssl\.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
"""paho leaves the socket of a handshake that failed to the garbage collector."""


@dataclass
class Clock:
    """A clock that a test may turn."""

    ahead: timedelta = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(timezone.utc) + self.ahead


@dataclass
class Fleet:
    """A fleet's folder with broker and enrolment at work."""

    folder: FleetFolder
    devices: Path
    """Folder of the devices' states."""
    url: str
    clock: Clock
    log: io.StringIO
    stack: ExitStack = field(default_factory=ExitStack)

    def token(self, device: str, hours: float = 24.0) -> str:
        return str(self.folder.issue_token(device, hours=hours, now=self.clock()))

    def join(self, device: str) -> TlsFiles:
        """Let a device in as its owner does; return what it has from that."""
        state = self.devices / device
        assert join(self.url, self.token(device), state).device == device
        return tls_files(state)

    def link(self, tls: TlsFiles, name: str, **more: Any) -> MqttTransport:
        """Connect with a certificate."""
        made = MqttTransport(self.folder.broker_for_devices, f"tunefleet-{name}", tls=tls, **more)
        self.stack.callback(made.close)
        made.connect()
        return made

    def aggregator(self) -> MqttTransport:
        return self.link(self.folder.tls, AGGREGATOR)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def make_folder(path: Path, ahead: timedelta = timedelta()) -> FleetFolder:
    """Make a fleet that listens on loopback alone, on free ports, by a clock that is ahead."""
    port, enrol_port = free_ports(2)
    settings = FleetSettings(
        hosts=["localhost"], port=port, enrol_port=enrol_port, bind="127.0.0.1"
    )
    return create_fleet(path, settings, datetime.now(timezone.utc) + ahead)


@contextmanager
def running_broker(folder: FleetFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Run Mosquitto on a fleet's configuration, as written."""
    config, log = folder.path / "mosquitto.conf", folder.path / "broker" / "log"
    with mosquitto_of(config, log, folder.port) as process:
        yield process


@contextmanager
def running_fleet(path: Path) -> Iterator[Fleet]:
    folder, clock, log = make_folder(path / "fleet"), Clock(), io.StringIO()
    events = EventLog(as_json=True, stream=log)
    with ExitStack() as stack:
        stack.enter_context(running_broker(folder))
        server = stack.enter_context(EnrolmentServer(folder, events, port=0, clock=clock))
        url = f"https://localhost:{server.port}"
        yield Fleet(folder, path / "devices", url, clock, log, stack)
