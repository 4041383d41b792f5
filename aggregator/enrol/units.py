"""systemd units: the aggregator as a service, and Debian's mosquitto service with its settings.

Both run as the owner of the fleet's folder. The broker is kept from the keys that it has no use
for, so that who breaks it can't let devices in or sign for the aggregator.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol.systemd import EVERYWHERE, OF_THE_SYSTEM, SANDBOX, argument, quoted

SETTINGS = "fleet.toml"


def aggregator_unit(folder: Path, user: str) -> str:
    """Return tunefleet-aggregator.service; it serves what fleet.toml in the folder names."""
    python, place = quoted(sys.executable), quoted(folder)
    command = f"{python} -m aggregator serve -c {argument(folder / SETTINGS)}"
    return f"""[Unit]
Description=Tunefleet aggregator
Wants=network-online.target
After=network-online.target mosquitto.service

[Service]
Type=notify
User={user}
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=10
# It is ready once its jobs are said to the broker, for which it waits as long as that takes.
TimeoutStartSec=infinity
# Told to stop, it takes in and answers what has come; a merge that is begun is ended.
TimeoutStopSec=5min
# Fed by each turn of its loop, each module that is merged, each message that is published.
WatchdogSec=5min
{SANDBOX}
{OF_THE_SYSTEM}
{EVERYWHERE}
ReadWritePaths={place}

[Install]
WantedBy=multi-user.target
"""


def daemon_settings() -> str:
    """Return fleet.toml, the daemon's settings, as a fleet begins with it."""
    return """# Settings of `aggregator serve -c fleet.toml`; docs/operator.md has all of them.
# Paths are from this folder.
dir = "."
jobs = ["job.toml"]

[log]
level = "info"
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
