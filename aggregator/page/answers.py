"""What the API answers that is not a view as it is, and what it is asked with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aggregator.view import DeviceView

NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
LARGEST = 2**53
"""Numbers up to this are the same in every program that reads JSON."""


class Problem(BaseModel):
    """Why something was not done."""

    detail: str


class DevicePage(BaseModel):
    """A page of devices."""

    total: int
    """Devices that are asked for, on all pages."""
    devices: list[DeviceView]


class Trust(BaseModel):
    """How a round's devices were mixed."""

    round: int
    devices: list[str]
    weights: list[list[float]]
    """Row i is what the adapter of device i was mixed of."""
    temperatures: dict[str, float]
    scores: list[list[float | None]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Policy(_Request):
    """Settings to change; what is left out stays as it is."""

    deadline_s: float | None = Field(None, gt=0, le=1e9)
    quorum: int | None = Field(None, ge=1, le=1_000_000)
    min_devices: int | None = Field(None, ge=1, le=1_000_000)
    fraction: float | None = Field(None, gt=0, le=1)
    reset: list[str] = Field([], max_length=16)
    """Settings that are to be the job file's again."""


class Rollback(_Request):
    """The version to go back to."""

    version: int = Field(ge=1, le=LARGEST)


class NewDevice(_Request):
    """A device that is to be let in."""

    device: str = Field(pattern=NAME)
    hours: float = Field(24.0, gt=0, le=24 * 90)
    """How long its token is good for."""


class Enrolled(BaseModel):
    """A token that lets a device in, once."""

    device: str
    token: str
    expires: float
    """Seconds since 1970."""
    command: str
    """What is entered on the device."""


class Done(BaseModel):
    """What came of an action."""

    said: str
    fields: dict[str, object] = {}


class Token(_Request):
    """What opens the page."""

    token: str = Field(max_length=512)
