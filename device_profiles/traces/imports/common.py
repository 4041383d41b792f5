"""What all imports share: bounded reading, names, samples from changes, what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from device_profiles.errors import TraceError
from device_profiles.traces.columns import Samples
from device_profiles.traces.format import Trace
from device_profiles.traces.sample import Value
from device_profiles.traces.synthetic import combine
from protocol.errors import os_words

MAX_BYTES = 1 << 30
MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class Imported:
    """Hold the traces of some files, and in words what could not be made one."""

    traces: list[Trace]
    left_out: list[str]


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        TraceError: it can't be read, or is larger than any that these formats have.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TraceError(path, f"is larger than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise TraceError(path, f"can't be read: {os_words(error)}") from None


class Names:
    """Give each trace a name of its own that can be a file's and a device's."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}
        """The number that each name was last given with."""

    def of(self, text: str) -> str:
        """Return small letters, digits and dashes; with a number where others have it already."""
        plain = (
            re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_NAME].rstrip("-") or "trace"
        )
        name, number = plain, self._last.get(plain, 1)
        while name in self._taken:
            number += 1
            name = f"{plain}-{number}"
        self._taken.add(name)
        self._last[plain] = number
        return name


def samples_of(changes: Iterable[tuple[float, Mapping[str, Value]]], end_s: float) -> Samples:
    """Return samples of what changes when, in any order; of two at one time the later counts."""
    ordered = sorted(changes, key=lambda change: change[0])
    last: dict[float, dict[str, Value]] = {}
    for t, values in ordered:
        last.setdefault(t, {}).update(values)
    series: dict[str, list[tuple[float, Value]]] = {}
    for t, values in last.items():
        for name, value in values.items():
            series.setdefault(name, []).append((t, value))
    return combine(series, end_s)
