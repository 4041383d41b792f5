"""systemd units: the aggregator as a service, and Debian's mosquitto service with its settings.

Both run as the owner of the fleet's folder. The broker is kept from the keys that it has no use
for, so that who breaks it can't let devices in or sign for the aggregator.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol.systemd import SANDBOX, quoted


def aggregator_unit(folder: Path, user: str) -> str:
    """Return tunefleet-aggregator.service; it serves job.toml in the fleet's folder."""
    python, job, place = quoted(sys.executable), quoted(folder / "job.toml"), quoted(folder)
    return f"""[Unit]
Description=Tunefleet aggregator
Wants=network-online.target
After=network-online.target mosquitto.service

[Service]
User={user}
ExecStart={python} -m aggregator serve {job} --dir {place}
Restart=on-failure
RestartSec=10
{SANDBOX}
ReadWritePaths={place}

[Install]
WantedBy=multi-user.target
"""


def mosquitto_drop_in(folder: Path, user: str, secrets: list[Path]) -> str:
    """Return a drop-in for Debian's mosquitto.service that uses the fleet's configuration."""
    hidden = " ".join(quoted(f"-{path}") for path in secrets)
    return f"""[Service]
User={user}
ExecStartPre=
ExecStart=
ExecStart=/usr/sbin/mosquitto -c {quoted(folder / "mosquitto.conf")}
{SANDBOX}
ReadWritePaths={quoted(folder / "broker")}
InaccessiblePaths={hidden}
LimitNOFILE=65536
"""
