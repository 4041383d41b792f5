"""`edge-client doctor`: whether a device has all it needs, and what to do where it has not.

find.py    the device as `run` would find it, as far as its files can be read
here.py    this computer: clock, certificate, keys, disk, memory, data, packages, policy
broker.py  the broker: is it there, does it let this device in, what does it take
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_client.policy.owner import Policy
from protocol.tls import TlsFiles
from protocol.transport import BrokerAddress

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    name: str
    level: Level
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.name:<9} {self.found}{remedy}"


@dataclass(frozen=True, slots=True)
class Patient:
    """The device as `run` would find it."""

    name: str
    state: Path
    cache: Path
    broker: BrokerAddress
    tls: TlsFiles | None
    data: tuple[Path, ...]
    model: str
    memory_cap_mib: float | None
    policy: Policy
    bad_membership: str = ""
    """Why it is not known which fleet it has joined; empty: it is, or it has joined none."""
    bad_policy: str = ""
    """Why the owner's policy is not known."""
