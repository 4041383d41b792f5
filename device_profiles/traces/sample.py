"""One moment of a device, and the bounds of each field; reader and JSON Schema go by this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PowerSource = Literal["mains", "battery", "unknown"]
POWER_SOURCES: tuple[PowerSource, ...] = ("mains", "battery", "unknown")
MAX_T_S = 1e9
"""Some thirty years: what is later is a date, not a time since the trace's start."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Say how a device is from `t` on; None: unknown."""

    t: float = 0.0
    """Seconds since the trace's start."""
    online: bool = True
    power: PowerSource = "unknown"
    battery_percent: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    memory_available_mib: float | None = None
    """What a program could still take, as the kernel's MemAvailable."""
    cpu_load: float | None = None
    """Share of all cores that others use, 0 to 1."""
    down_mbit: float | None = None
    """What the link carries, in Mbit/s (10**6 bit/s); 0: connected, and nothing comes through."""
    up_mbit: float | None = None
    metered: bool | None = None


Value = float | bool | str | None
"""Of a field."""


@dataclass(frozen=True, slots=True)
class Field:
    """Bound one field of a line; `kind` says what JSON type it has."""

    name: str
    kind: Literal["number", "flag", "power"]
    says: str
    least: float = 0.0
    most: float = 0.0
    nullable: bool = True

    @property
    def allowed(self) -> str:
        """Say what may stand here."""
        if self.kind == "power":
            words = ", ".join(f'"{source}"' for source in POWER_SOURCES)
        elif self.kind == "flag":
            words = "true or false"
        else:
            words = f"a number from {self.least:g} to {self.most:g}"
        return f"{words}, or null" if self.nullable else words

    def take(self, value: object) -> Value:
        """Return a value as JSON has it in the type that a sample has.

        Raises:
            ValueError: it is not allowed.
        """
        if value is None and self.nullable:
            return "unknown" if self.kind == "power" else None
        if self.kind == "power" and isinstance(value, str) and value in POWER_SOURCES:
            return value
        if self.kind == "flag" and isinstance(value, bool):
            return value
        if (
            self.kind == "number"
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.least <= value <= self.most  # an int of any length compares
        ):
            return float(value)
        raise ValueError(self.allowed)


TIME = Field("t", "number", "Seconds since the trace's start.", 0, MAX_T_S, nullable=False)
FIELDS: tuple[Field, ...] = (
    Field("online", "flag", "Whether the device can reach the network.", nullable=False),
    Field("power", "power", "What feeds the device."),
    Field("battery_percent", "number", "How full the battery is.", 0, 100),
    Field("temperature_c", "number", "Of the processor, in °C.", -60, 200),
    Field("throttled", "flag", "Whether heat or low voltage slows the processor down."),
    Field("memory_available_mib", "number", "What a program could still take, MiB.", 0, 2**40),
    Field("cpu_load", "number", "Share of all cores that others use.", 0, 1),
    Field("down_mbit", "number", "What the link carries to the device, Mbit/s.", 0, 1e6),
    Field("up_mbit", "number", "What the link carries from the device, Mbit/s.", 0, 1e6),
    Field("metered", "flag", "Whether the network counts what goes through it."),
)
