"""What a sink is, and what it is told of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aggregator.view import RoundView

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """A job that is tracked."""

    job: str
    settings: Mapping[str, Any]
    folder: Path
    """Where a sink keeps its own, which is made."""
    options: Mapping[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """Write down the rounds of one run. It belongs to one thread, which makes and closes it."""

    def log(self, step: int, values: Values) -> None:
        """Write down a round; `step` is its number, which only grows."""

    def close(self) -> None:
        """Write what is not written yet, and end."""


def values_of(view: RoundView) -> dict[str, float]:
    """Return what is told of a round, by names that every tracker takes."""
    known = {
        "loss/held_out": view.loss,
        "merge/seconds": view.merge_s,
        "merge/residual": view.residual,
        "devices/counted": view.counted,
        "devices/refused": view.refused,
        "bytes/up": view.up_bytes,
        "bytes/down": view.down_bytes,
        "version": view.version,
    }
    if view.opened is not None and view.ended is not None:
        known["round/seconds"] = view.ended - view.opened
    known |= {f"rank/{rank}": devices for rank, devices in view.ranks.items()}
    return {name: float(value) for name, value in known.items() if value is not None}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a job's settings as the flat words that trackers take, a table's behind its name."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if name == "modules":
            flat[name] = str(len(value))
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": word for inner, word in flat_settings(value).items()}
        else:
            flat[name] = str(value)[:250]
    return flat
