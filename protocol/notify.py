"""Tell systemd how a service is: ready, what it is at, alive (sd_notify(3)).

Only progress says that it is alive. Of a device: a turn of the agent's loop, a step or batch of its
training, a step of measuring, a file that is read; of the aggregator: a turn of its loop, a module
of an update that is merged, a message that is published or taken in meanwhile.
One that hangs is ended and started again by its unit's WatchdogSec.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

ALIVE_EVERY_S = 5.0
_last_alive = time.monotonic() - ALIVE_EVERY_S


def notify(**fields: str) -> None:
    """Send variables, say READY="1", to the service manager; nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # in the abstract namespace
        address = "\0" + address[1:]
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.setblocking(False)  # a manager that does not listen holds nothing up
        link.sendto(message.encode(), address)


def since_alive_s() -> float:
    """Return for how many seconds nothing has said that the work goes on."""
    return time.monotonic() - _last_alive


def alive() -> None:
    """Say that the work goes on; call it as often as it does."""
    global _last_alive
    if time.monotonic() - _last_alive >= ALIVE_EVERY_S:
        _last_alive = time.monotonic()
        notify(WATCHDOG="1")
