"""Where an agent has the time and its device's state from: the device itself, or a trace of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edge_client.plan import Plan
from edge_client.policy.decide import DeviceState
from edge_client.policy.owner import Policy
from edge_client.pressure import Reading, read_pressure


@dataclass(frozen=True, slots=True)
class Senses:
    """Hold what an agent asks; by default it is told of the device that it runs on."""

    now: Callable[[], datetime] = datetime.now
    """The local time, by which an owner's hours and days go."""
    clock: Callable[[], float] = time.monotonic
    """Seconds that never fall."""
    state: Callable[[Policy], DeviceState] | None = None
    """How the device is; None: as /proc and /sys say (`policy.sensors`)."""
    pressure: Callable[[Path, float], Reading] = read_pressure
    """How short of memory it is, under a root, at a time of the clock."""
    taken_mib: Callable[[], float] | None = None
    """What training takes now; None: what the training processes of this one do."""
    download_bytes: Callable[[], float] | None = None
    """What its link carries in the time that one version may take; None: as its profile says."""
    needs_mib: Callable[[Plan], float] = lambda plan: plan.floor_mib + plan.predicted_mib
    """What of its memory training by a plan takes."""
    plans_anew: bool = False
    """Whether to plan again for each round, and when memory runs short, by what there is then."""


OWN = Senses()
