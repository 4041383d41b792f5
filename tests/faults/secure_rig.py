"""A fleet under fire that has a fleet's folder: certificates, access rules, TLS, enrolment."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aggregator.enrol.server import EnrolmentServer, utc_now
from edge_client.join import join
from protocol.events import EventLog
from tests.faults.rig import Rig
from tests.security.fleet import make_folder

HOUSE = ("attic", "barn", "cellar", "dairy")
QUORUM = 3
"""With which rounds go on without one of them."""


class SecureRig(Rig):
    """Run broker and aggregator on a fleet's folder as `aggregator init` makes it.

    Its devices have joined as their owners do, and have their certificates from that.
    """

    def __init__(
        self, folder: Path, seed: int, devices: Sequence[str], *more: Any, **settings: Any
    ):
        """Make the fleet; nobody is in it yet."""
        super().__init__(folder, seed, devices, *more, **settings)
        self.fleet = make_folder(folder / "fleet")
        self.broker_home, self.port = self.fleet.path, self.fleet.port
        self.serve = ("--dir", self.fleet.path)
        self.addresses = dict.fromkeys(devices, str(self.fleet.broker_for_devices))

    def clear(self) -> None:
        """Take away what all of them have on disk, but the fleet's folder; let all devices in."""
        super().clear()
        silent = EventLog(as_json=True, stream=io.StringIO())
        with EnrolmentServer(self.fleet, silent, port=0) as server:
            for name in self.devices:
                self._join(name, server.port)

    def enrol(self, name: str) -> None:
        """Let a device in, once more, at the door that the aggregator keeps."""
        self._join(name, self.fleet.settings.enrol_port)

    def need(self, quorum: int) -> None:
        """Have the aggregator, started anew, merge no round of fewer updates."""
        path = self.folder / "job.json"
        job = json.loads(path.read_text())
        job["policy"]["quorum"] = quorum
        path.write_text(json.dumps(job))
        self.restart(self.aggregator)

    def _join(self, name: str, port: int) -> None:
        token = self.fleet.issue_token(name, hours=1, now=utc_now())
        join(f"https://localhost:{port}", str(token), self.folder / name)
