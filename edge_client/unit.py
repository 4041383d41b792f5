"""A device as a service: its systemd unit, the user's own or the system's.

A user's service manager may not make mount namespaces or drop capabilities, so its unit has what
works by system call filters and cgroups alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.policy.owner import Policy
from protocol.systemd import (
    ADDRESS_FAMILIES,
    EVERYWHERE,
    OF_THE_SYSTEM,
    SANDBOX,
    SYSTEM_CALLS,
    argument,
    quoted,
)

NAME = "tunefleet-device.service"
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))
"""Of these a service of the system has its own, which are empty: PrivateTmp."""
AGENT_MIB = 384
"""What the agent takes beside its training process, with room for adapters on their way."""
NICE, CPU_WEIGHT = 10, 20
"""Where the owner's policy says nothing."""


@dataclass(frozen=True, slots=True)
class Service:
    """What a unit is written from."""

    arguments: Sequence[str]
    """Of `edge-client`, with absolute paths."""
    writes: Sequence[Path]
    """Folders that it writes to."""
    policy: Policy
    memory_cap_mib: float | None
    user: str = ""
    """Whom a system service runs as; empty: it is a user's own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it is to have, and anybody on this computer may read."""
    secrets: Path | None = None
    """File of the variables that nobody else may read; None: there are none."""
    name: str = NAME
    """What its unit is called: a second device of this computer needs another."""


def device_unit(service: Service) -> str:
    """Return the text of the unit."""
    system, policy = bool(service.user), service.policy
    arguments = " ".join(argument(word) for word in service.arguments)
    online = "Wants=network-online.target\nAfter=network-online.target\n" if system else ""
    cap_mib = service.memory_cap_mib
    memory = f"MemoryMax={int(cap_mib + AGENT_MIB)}M\n" if cap_mib else ""
    if system:
        writes = " ".join(quoted(path) for path in service.writes)
        sandbox = f"User={service.user}\n{SANDBOX}\n{OF_THE_SYSTEM}\nReadWritePaths={writes}"
    else:
        sandbox = f"NoNewPrivileges=yes\n{ADDRESS_FAMILIES}\n{SYSTEM_CALLS}\nUMask=0077"
    return f"""[Unit]
Description=Tunefleet device: fine-tunes on this computer's own text
{online}
[Service]
Type=notify
ExecStart={argument(sys.executable)} -m edge_client {arguments}
{_environment(service)}Restart=on-failure
RestartSec=30
# Told to stop, the agent has its training process end its step and keep what it has.
KillMode=mixed
TimeoutStopSec=60
# Fed by each step and batch of training, and by each turn of the agent while it waits.
WatchdogSec=15min
# The kernel may take the training process: the agent goes on with a smaller plan.
OOMPolicy=continue
{memory}Nice={NICE if policy.nice is None else policy.nice}
IOSchedulingClass={"best-effort" if policy.io == "normal" else "idle"}
CPUWeight={policy.cpu_weight or CPU_WEIGHT}
{sandbox}
{EVERYWHERE}

[Install]
WantedBy={"multi-user.target" if system else "default.target"}
"""


def hidden_folder(service: Service, paths: Iterable[Path]) -> Path | None:
    """Return the first of the paths that the service would not find; None: it finds them all."""
    if not service.user:
        return None
    return next((p for p in paths if any(p.resolve().is_relative_to(t) for t in TEMPORARY)), None)


def _environment(service: Service) -> str:
    """Return the lines that give the service its variables."""
    named = service.environment.items()
    lines = [f"Environment={quoted(f'{name}={value}')}\n" for name, value in named]
    if service.secrets:
        path = str(service.secrets).replace("%", "%%")  # it is read to the end of the line
        lines.append(f"EnvironmentFile={path}\n")
    return "".join(lines)
