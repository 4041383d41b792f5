"""Letting a device in from the page: the token is made here, and shown once."""

from __future__ import annotations

import time
from pathlib import Path

from aggregator.control import Enrol, ask
from aggregator.enrol import ca
from aggregator.enrol.folder import FleetFolder
from aggregator.page.answers import Enrolled
from protocol.enrolment import Token
from protocol.link import in_url

TIMEOUT_S = 20.0


def enrol(fleet: Path, root: Path, device: str, hours: float, *, by: str) -> Enrolled:
    """Have the aggregator let a device in, once, and return the token and how it is used.

    The aggregator is told the token's hash alone.

    Raises:
        NoDaemon: nobody serves the fleet.
        ControlRefused: it does not do it.
        FolderError: the fleet's folder is not in order.
    """
    folder = FleetFolder(fleet)
    token = Token.issue(ca.sha256(folder.authority().certificate))
    expires = time.time() + hours * 3600
    ask(root, Enrol(device, token.digest, expires), by=by, timeout_s=TIMEOUT_S)
    where = f"https://{in_url(folder.settings.hosts[0])}:{folder.settings.enrol_port}"
    command = f"edge-client join {where} --token {token}"
    return Enrolled(device=device, token=str(token), expires=expires, command=command)
