"""What people and programs look at: read-only snapshots of a daemon's state, running or not.

`StateView` reads one job's state folder on a connection of its own, `FleetReader` all that a daemon
serves. Neither writes anything, nor holds the daemon up: SQLite's write-ahead log lets both go on.
Time is in seconds since 1970, sizes in bytes.
"""

from __future__ import annotations

from aggregator.view.fleet import FleetReader
from aggregator.view.models import (
    Crowd,
    DeviceCounts,
    DeviceDetail,
    DeviceView,
    FleetView,
    JobView,
    PlanView,
    RoundDevice,
    RoundView,
    Totals,
    VersionView,
)
from aggregator.view.state import StateView

__all__ = [
    "Crowd",
    "DeviceCounts",
    "DeviceDetail",
    "DeviceView",
    "FleetReader",
    "FleetView",
    "JobView",
    "PlanView",
    "RoundDevice",
    "RoundView",
    "StateView",
    "Totals",
    "VersionView",
]
