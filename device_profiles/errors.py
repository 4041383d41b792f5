"""Errors of the device_profiles package.

TunefleetError
├── ProfileError               a device profile that is not there or cannot be read
└── DemoTextError              this Python lacks a part of its library that the demo reads
"""

from __future__ import annotations

from protocol.errors import TunefleetError


class ProfileError(TunefleetError):
    """A device profile that is not there, is no TOML, or has a field that is wrong."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"device profile {where}: {why}")
        self.where = where
        self.why = why


class DemoTextError(TunefleetError):
    """The text of the demo's devices can't be made: a part of this Python's library is missing."""


class FleetError(TunefleetError):
    """A fleet file that can't be read, or lacks something."""


class ReplayError(TunefleetError):
    """A replay could not be carried out: a process failed, or a folder can't be written."""


class TooLarge(ReplayError):
    """No plan fits a device."""
