"""What a replay of a fleet ends with: one summary, and how its figures are said.

`fleet-replay` writes the summary as JSON; `tables` shows it on a terminal and `report` as a page.
Every figure that was not measured is None; a NaN or an infinity is read as "not measured", so
that a diverged run still gets its report.

Units: losses are held-out nats per token, memory is MiB, traffic is bytes, durations are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Measured = float | None
"""A measured number, or None where nothing (or nothing finite) was measured."""

MEMORY_BAND = 0.25
"""How far a measured peak may lie from its prediction, as a share of the prediction."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_was_not_measured(cls, fields: Any) -> Any:
        """Leave out fields that are None, NaN or infinite, so that their defaults stand."""
        if not isinstance(fields, Mapping):
            return fields
        return {key: value for key, value in fields.items() if _is_known(value)}


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


class Losses(_Record):
    """Compare held-out losses, in nats per token; lower is better."""

    base: Measured = None
    """The base model with no adapter."""
    local: Measured = None
    """After the same steps on the device's own text alone, never merged."""
    merged: Measured = None
    """With the last common adapter at its full rank."""
    merged_on_device: Measured = None
    """With the last common adapter cut to the rank the device holds."""
    personal: Measured = None
    """With the adapter of its own that the device ends with, under a rule that gives it one."""

    @property
    def together(self) -> float | None:
        """Return what a device gets of the fleet: its own adapter's loss, else the common one's."""
        return self.merged if self.personal is None else self.personal


class DeviceSummary(_Record):
    """Tell how one device went through the replay."""

    name: str
    profile: str = ""
    """Slug of the device profile, as in `device_profiles/<slug>.toml`."""
    title: str = ""
    """The profile's name for people."""
    text: str = ""
    """What text the device has."""
    budget_mib: Measured = None
    """What the training process may take above its floor."""
    floor_mib: Measured = None
    """What the process takes before the first training step."""
    predicted_mib: Measured = None
    """Predicted peak, above the floor."""
    peak_mib: Measured = None
    """Measured peak, above the floor."""
    rank_start: int | None = None
    rank_end: int | None = None
    held_rank: int | None = None
    """Rank of the common adapter that the device keeps."""
    backend: str = ""
    """What it trained with: torch or onnx."""
    plan: str = ""
    """Short text of the training plan: micro-batch, tokens, accumulation, checkpointing, dtype."""
    loss: Losses = Losses()
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0
    """Tokens trained on, over all rounds."""

    @property
    def room_mib(self) -> float | None:
        """Return what the budget leaves above the floor, in MiB; None where there is no room."""
        return self.budget_mib if self.budget_mib and self.budget_mib > 0 else None

    @property
    def memory_as_predicted(self) -> bool | None:
        """Tell whether the measured peak lies within `MEMORY_BAND` of the predicted one."""
        share = self.peak_share
        return None if share is None else abs(share - 1) <= MEMORY_BAND

    @property
    def peak_share(self) -> float | None:
        """Return measured over predicted peak; None where either was not measured."""
        if not self.predicted_mib or self.peak_mib is None:
            return None
        return self.peak_mib / self.predicted_mib

    @property
    def budget_share(self) -> float | None:
        """Return the share of the budget that the measured peak took; above 1: it went over."""
        if self.room_mib is None or self.peak_mib is None:
            return None
        return self.peak_mib / self.room_mib

    @property
    def gain(self) -> float | None:
        """Return by what share a device ends below the local loss with what the fleet gave it."""
        return gain(self.loss.local, self.loss.together)


class DeviceRound(_Record):
    """Tell what one device did in one round."""

    rank: int | None = None
    loss: Measured = None
    """Held-out nats per token of the adapter it held at the round's start: common, or its own."""
    train_loss: Measured = None
    """Mean nats per token on its own text while training."""
    bytes_up: int = 0
    bytes_down: int = 0
    weight: Measured = None
    """Its share in the merge, 0 to 1."""


class Trust(_Record):
    """Tell how the devices of one round were mixed."""

    devices: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    """(K, K): row i is what the adapter of device i was mixed of; each row sums to 1."""
    temperatures: dict[str, float] = Field(default_factory=dict)
    """Of the devices that got an adapter of their own."""

    @model_validator(mode="after")
    def _square(self) -> Trust:
        count = len(self.devices)
        if [len(row) for row in self.weights] != [count] * count:
            raise ValueError(f"weights must be {count} rows of {count}")
        return self


class Round(_Record):
    """Tell what one round did; a device that took no part is missing from `devices`."""

    round: int
    version: int | None = None
    """Version of the common adapter that the round's merge published."""
    merge_s: Measured = None
    warnings: tuple[str, ...] = ()
    """What the rule could not do as the job says, in words."""
    devices: dict[str, DeviceRound] = Field(default_factory=dict)
    trust: Trust | None = None
    """Only with a rule that makes personal adapters."""


class Summary(_Record):
    """Hold a whole replay: its settings, its end, and its rounds."""

    rule: str = ""
    """The rule that merges deltas of unequal rank."""
    seed: int | None = None
    rounds: int | None = None
    wall_s: Measured = None
    base_model: str = ""
    base_parameters: int | None = None
    memory_scale: Measured = None
    """Factor on every device's memory, so that a small base stands for a large one."""
    ladder: tuple[int, ...] = ()
    """The ranks that a plan may choose from."""
    rank_max: int | None = None
    remainder: Literal["frozen", "dropped"] | str = ""
    """What becomes of directions above a device's rank."""
    directions: Literal["top", "rotating"] | str = ""
    """Which directions a device of low rank trains."""
    broker: str = ""
    loss: Losses = Losses()
    """Means over the devices, each on its own text."""
    across: Losses = Losses()
    """Means over the text of the whole fleet, on a sample; `local` over all devices' adapters."""
    devices: tuple[DeviceSummary, ...] = ()
    history: tuple[Round, ...] = ()

    @property
    def has_onnx(self) -> bool:
        """Whether a device trained with ONNX Runtime."""
        return any(device.backend == "onnx" for device in self.devices)

    @property
    def is_personal(self) -> bool:
        """Whether a device ends with an adapter of its own."""
        return any(device.loss.personal is not None for device in self.devices)

    @property
    def mean_loss(self) -> Losses:
        """Return `loss`, its gaps filled with the mean over the devices that have the figure."""
        found = {
            field: own if own is not None else mean(getattr(d.loss, field) for d in self.devices)
            for field, own in self.loss
        }
        return Losses(**found)


def read_summary(summary: Summary | Mapping[str, Any]) -> Summary:
    """Return `summary` as a `Summary`.

    Raises:
        pydantic.ValidationError: a field holds something else than its kind; it names the field.
    """
    return summary if isinstance(summary, Summary) else Summary.model_validate(dict(summary))


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None if there are none."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def gain(before: float | None, after: float | None) -> float | None:
    """Return 1 - after/before: the share by which a loss fell; negative if it rose."""
    if not before or after is None:
        return None
    return (before - after) / before


def rank_path(device: DeviceSummary) -> str:
    """Return "16 → 11", or the one rank where it did not change."""
    start, end = device.rank_start, device.rank_end
    known = [str(rank) for rank in dict.fromkeys((start, end)) if rank is not None]
    return " → ".join(known) or "\N{EN DASH}"
