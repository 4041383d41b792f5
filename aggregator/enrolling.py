"""Letting a device in by asking the daemon that runs: the token itself is written down nowhere."""

from __future__ import annotations

from datetime import datetime, timedelta

from aggregator.control import Enrol, ask
from aggregator.enrol import ca
from aggregator.enrol.folder import HOURS_MAX, FleetFolder, check_device
from aggregator.errors import ControlRefused
from protocol.enrolment import Token


def enrol(fleet: FleetFolder, device: str, *, hours: float, by: str, now: datetime) -> Token:
    """Return a new token for a device, good once and for so long; the daemon has its hash.

    Raises:
        FolderError: the name can't be a device's, or the fleet's certificate is not in order.
        ControlRefused: the time is not one, or the daemon does not do it.
        NoDaemon: none runs; `FleetFolder.issue_token` needs none.
    """
    check_device(device)
    if not 0 < hours <= HOURS_MAX:
        raise ControlRefused("wrong", f"a token is good for some time, up to {HOURS_MAX} hours")
    token = Token.issue(ca.sha256(fleet.ca_certificate()))
    expires = (now + timedelta(hours=hours)).timestamp()
    ask(fleet.path / "state", Enrol(device, token.digest, expires), by=by)
    return token
