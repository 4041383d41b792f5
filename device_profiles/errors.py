"""Errors of the device_profiles package.

TunefleetError
├── ProfileError               a device profile that is not there or cannot be read
├── TraceError                 a trace that can't be read or written
├── DemoTextError              this Python lacks a part of its library that the demo reads
├── FleetError                 a fleet file
└── ReplayError                a replay could not be carried out
    └── TooLarge               no plan fits a device
"""

from __future__ import annotations

import reprlib

from protocol.errors import TunefleetError


class ProfileError(TunefleetError):
    """A device profile that is not there, is no TOML, or has a field that is wrong."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"device profile {where}: {why}")
        self.where = where
        self.why = why


class TraceError(TunefleetError):
    """A trace that can't be read or written; names the file, and line and field where it is one."""

    def __init__(self, path: object, why: str, line: int | None = None, field: str = "") -> None:
        place = f"{path}" + (f", line {line}" if line else "")
        named = f"field {reprlib.repr(field)}: " if field else ""
        super().__init__(f"trace {place}: {named}{why}")
        self.path, self.why, self.line, self.field = path, why, line, field


class DemoTextError(TunefleetError):
    """The text of the demo's devices can't be made: a part of this Python's library is missing."""


class FleetError(TunefleetError):
    """A fleet file that can't be read, or lacks something."""


class ReplayError(TunefleetError):
    """A replay could not be carried out: a process failed, or a folder can't be written."""


class TooLarge(ReplayError):
    """No plan fits a device."""
