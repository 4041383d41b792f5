"""The file in which a device's owner says what training may cost; docs/device.md has every key.

battery_above = 40                   # percent; 100: on mains power alone
temperature_below = 75               # °C
hours = ["22:00-07:00", "sat-sun 00:00-24:00"]
metered = "wait"
minutes_a_day = 240
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edge_client.errors import ConfigError
from edge_client.policy.hours import Window, parse_window
from protocol.files import user_folder
from protocol.mistakes import first_mistake, unknown_setting
from protocol.settings_file import read_settings

FILE = "policy.toml"
COOLEST_C, QUIETEST, LEAST_MINUTES, LEAST_MIB = 40.0, 0.03, 1.0, 0.1
"""Limits below which a setting hardly ever lets a device train or transfer."""


class Policy(BaseModel):
    """What the owner allows; without a setting nothing is held up by it."""

    model_config = ConfigDict(frozen=True, strict=True)

    battery_above: float = Field(0.0, ge=0, le=100)
    """On battery train only while it is fuller than this, in percent; 100: on mains alone."""
    temperature_below: float | None = Field(None, ge=20, le=120)
    """Train only while the processor is cooler than this, in °C."""
    idle_below: float | None = Field(None, gt=0, le=1)
    """Train only while others use less than this share of all cores."""
    hours: list[str] = Field([], max_length=64)
    """Train only within these windows; see `edge_client.policy.hours`. None: at any time."""
    metered: Literal["use", "wait"] = "use"
    """Whether to transfer anything over a network that counts what goes through it."""
    mib_a_day: float | None = Field(None, gt=0, le=1e9)
    """What may go through the network in a day, both ways together, in MiB."""
    mib_a_round: float | None = Field(None, gt=0, le=1e9)
    """What a round may transfer, both ways together, in MiB: it limits rank and bands."""
    minutes_a_day: float | None = Field(None, gt=0, le=24 * 60)
    """How long to train in a day."""
    nice: int | None = Field(None, ge=0, le=19)
    """Priority of all that the device does: 19 gives way to everything else."""
    io: Literal["normal", "idle"] | None = None
    """Whether the disk is used only while nobody else uses it."""
    cpu_weight: int | None = Field(None, ge=1, le=10_000)
    """A service's share of the processor when others want it too; what others have is 100."""

    @field_validator("hours")
    @classmethod
    def _check_hours(cls, given: list[str]) -> list[str]:
        for text in given:
            parse_window(text)
        return given

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        return tuple(parse_window(text) for text in self.hours)


def doubts(policy: Policy) -> list[str]:
    """Return in words what settings hardly ever let a device train or transfer."""
    heat, load = policy.temperature_below, policy.idle_below
    minutes, mib = policy.minutes_a_day, policy.mib_a_day
    found = []
    if heat is not None and heat < COOLEST_C:
        found.append(f"temperature_below = {heat:g}: few processors are that cool while they work")
    if load is not None and load < QUIETEST:
        found.append(f"idle_below = {load:g}: a system at rest uses about as much")
    if minutes is not None and minutes < LEAST_MINUTES:
        found.append(f"minutes_a_day = {minutes:g}: a step or two a day")
    if mib is not None and mib < LEAST_MIB:
        found.append(f"mib_a_day = {mib:g}: one version of an adapter takes more")
    return found


def find_policy(state: Path, given: Path | None) -> Policy:
    """Return the owner's policy: `given`, or the state folder's, or the user's, or none.

    Raises:
        ConfigError: the file can't be read, or a setting is unknown or wrong; says which.
    """
    path = given or policy_file(state)
    return read_policy(path) if path else Policy()


def policy_file(state: Path) -> Path | None:
    """Return where a policy is that nobody has named: in the state folder, or the user's."""
    places = (state / FILE, user_folder() / FILE)
    return next((place for place in places if place.exists()), None)


def read_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: the file can't be read, or a setting is unknown or wrong; says which.
    """
    fields = read_settings(path, "policy", ConfigError)
    if unknown := unknown_setting(fields, {"": [*Policy.model_fields]}):
        raise ConfigError(f"{path}: {unknown}")
    try:
        return Policy.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_mistake(error)}") from None
