"""Read and write traces: JSON Lines, a header and samples in ascending time (docs/traces.md).

{"format": "tunefleet-trace", "version": 1, "name": "pi", "profile": null, "source": "…"}
{"t": 0, "online": true, "power": "mains", "memory_available_mib": 3210, "down_mbit": 11.5}
{"t": 1, "down_mbit": 9.25}

A field that is left out is as in the sample before, null is unknown.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from device_profiles.errors import TraceError
from device_profiles.traces.columns import Rows, Samples
from device_profiles.traces.sample import FIELDS, TIME, Sample, Value
from protocol.errors import os_words

__all__ = ["Sample", "TornLine", "Trace", "read_trace", "read_traces", "write_trace"]

FORMAT, VERSION = "tunefleet-trace", 1
SUFFIX = ".jsonl"
MAX_LINE_BYTES = 16 * 1024
SLACK_S = 1e-6
"""Times of a replay are sums of floats: at the time of a change its sample is to hold."""
MAX_TEXT = 1000
"""Characters of a text in the header."""
MAX_SAMPLES = 10_000_000
"""Of one trace: four months at one a second."""
TEXTS = {"name": False, "profile": True, "source": True, "licence": True}
"""Texts of the header, and whether each may be null."""
_BY_NAME = {field.name: index for index, field in enumerate(FIELDS)}
_BEFORE_FIRST: tuple[Value, ...] = tuple(getattr(Sample(), field.name) for field in FIELDS)
Warn = Callable[[str], object]


class TornLine(UserWarning):
    """The last line of a trace is not whole: whoever wrote it was killed. It is left out."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Say how one device fared: at each time, as the last sample before it says."""

    name: str
    profile: str | None
    """Of a bundled profile."""
    source: str | None
    licence: str | None
    samples: Sequence[Sample]

    def __post_init__(self) -> None:
        if not isinstance(self.samples, Samples):
            object.__setattr__(self, "samples", Samples.of(self.samples))

    @property
    def duration_s(self) -> float:
        """Return the time of the last sample, which is where a looped trace begins again."""
        return self._columns.times[-1]

    def at(self, t_s: float) -> Sample:
        """Return how the device is at a time: before the first sample the first, later the last."""
        return self._columns[self._columns.index_at(t_s)]

    def looped(self, t_s: float) -> Sample:
        """Return how the device is at a time where the trace begins again at its end."""
        return self.at(self._within(t_s))

    def looped_change(self, t_s: float, field: str = "") -> float | None:
        """Return when a trace that begins again at its end says something new after a time.

        Of one `field`: when that has another value. None: never.
        """
        within = self._within(t_s)
        change = self._columns.change_after(within, field)
        return None if change is None else t_s + SLACK_S + (change - within)

    def _within(self, t_s: float) -> float:
        """Return where in the trace a time is, `SLACK_S` ahead of it."""
        return (t_s + SLACK_S) % self.duration_s if self.duration_s else 0.0

    @property
    def _columns(self) -> Samples:
        assert isinstance(self.samples, Samples)
        return self.samples


def read_trace(path: Path, *, warn: Warn | None = None) -> Trace:
    """Read a trace.

    A last line that is not whole is left out and told to `warn`, else as a `TornLine`.

    Raises:
        TraceError: it can't be read, or a line is wrong; says which, which field, what is allowed.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, warn or _warn)
    except OSError as error:
        raise TraceError(path, f"can't be read: {os_words(error)}") from None


def read_traces(place: Path, *, warn: Warn | None = None) -> list[Trace]:
    """Read one trace, or those of a folder (its *.jsonl files), sorted by name.

    Columns that are equal are kept once.

    Raises:
        TraceError: as `read_trace`; a folder has none, or two have one name.
    """
    paths = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]
    if not paths:
        raise TraceError(place, f"there is no trace (*{SUFFIX}) in this folder")
    known: dict[bytes, Any] = {}
    found: dict[str, tuple[Trace, Path]] = {}
    for path in paths:
        trace = read_trace(path, warn=warn)
        if trace.name in found:
            other = found[trace.name][1].name
            raise TraceError(path, f"its name {trace.name!r} is that of {other} too", 1, "name")
        shared = trace._columns.shared(known)
        found[trace.name] = (
            Trace(trace.name, trace.profile, trace.source, trace.licence, shared),
            path,
        )
    return [found[name][0] for name in sorted(found)]


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace, whole or not at all; the same trace always gives the same bytes.

    Raises:
        TraceError: it can't be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(header_line(trace.name, trace.profile, trace.source, trace.licence))
            file.writelines(sample_lines(trace.samples))
        os.replace(part, path)
    except OSError as error:
        raise TraceError(path, f"can't be written: {os_words(error)}") from None


def header_line(name: str, profile: str | None, source: str | None, licence: str | None) -> str:
    """Return the first line of a trace."""
    texts = {"name": name, "profile": profile, "source": source, "licence": licence}
    return _line({"format": FORMAT, "version": VERSION, **texts})


def sample_lines(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield the lines of samples, each with what differs from the one before."""
    before: Sample | None = None
    for sample in samples:
        yield sample_line(sample, before)
        before = sample


def sample_line(sample: Sample, before: Sample | None) -> str:
    """Return the line of a sample: its time, and what differs from the sample before.

    The first sample of a trace has every field that is not as where nothing is said.
    """
    last = before or Sample()
    changed = {
        field.name: _short(value)
        for field in FIELDS
        if (value := getattr(sample, field.name)) != getattr(last, field.name)
    }
    return _line({"t": _short(sample.t), **changed})


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"


def _short(value: Any) -> Any:
    """Return a number without the .0 of a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(path: Path, file: IO[bytes], warn: Warn) -> Trace:
    first = file.readline(MAX_LINE_BYTES + 1)
    if not first:
        raise TraceError(path, "it is empty; a trace begins with a header", 1)
    texts = _header(path, _object(path, 1, first))
    rows = Rows()
    values = list(_BEFORE_FIRST)
    number = 1
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        try:
            found = _object(path, number, raw)
        except TraceError:
            if raw.endswith(b"\n") or len(raw) > MAX_LINE_BYTES:
                raise
            warn(f"{path}: line {number}, its last, is not whole and was left out")
            break
        t, changes = _changes(path, number, found, rows.last_t)
        if len(rows) == MAX_SAMPLES:
            raise TraceError(path, f"a trace has at most {MAX_SAMPLES} samples", number)
        for index, value in changes.items():
            values[index] = value
        rows.append(t, values)
    if not len(rows):
        raise TraceError(path, "it has no sample", number)
    return Trace(
        str(texts["name"]), texts["profile"], texts["source"], texts["licence"], rows.finish()
    )


def _object(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    """Return the JSON object on a line."""
    if len(raw) > MAX_LINE_BYTES:
        raise TraceError(path, f"a line has at most {MAX_LINE_BYTES} bytes", number)
    try:
        found = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise TraceError(path, "is not JSON; each line is one object", number) from None
    if not isinstance(found, dict):
        raise TraceError(path, "is no object; write {…}", number)
    return found


def _header(path: Path, found: dict[str, Any]) -> dict[str, str | None]:
    if found.get("format") != FORMAT:
        why = f'must be "{FORMAT}"; other files become traces by `fleet-replay import`'
        raise TraceError(path, why, 1, "format")
    version = found.get("version")
    if version != VERSION or isinstance(version, bool):
        raise TraceError(path, f"must be {VERSION}, which this program reads", 1, "version")
    for key in found:
        if key not in (*TEXTS, "format", "version"):
            raise TraceError(path, f"is unknown; allowed are {', '.join(TEXTS)}", 1, key)
    texts: dict[str, str | None] = {}
    for key, nullable in TEXTS.items():
        value = found.get(key)
        if value is None and nullable:
            texts[key] = None
        elif isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable():
            texts[key] = value
        else:
            why = f"must be text of 1 to {MAX_TEXT} characters on one line"
            raise TraceError(path, why + (", or null" if nullable else ""), 1, key)
    return texts


def _changes(
    path: Path, number: int, found: dict[str, Any], last_t: float | None
) -> tuple[float, dict[int, Value]]:
    """Return the time of a sample, and what it changes by the field's index."""
    changes: dict[int, Value] = {}
    t: float | None = None
    for key, value in found.items():
        index = _BY_NAME.get(key)
        if index is None and key != TIME.name:
            names = ", ".join((TIME.name, *_BY_NAME))
            raise TraceError(path, f"is unknown; allowed are {names}", number, key)
        field = TIME if index is None else FIELDS[index]
        try:
            taken = field.take(value)
        except ValueError as error:
            raise TraceError(path, f"must be {error}", number, key) from None
        if index is None:
            t = float(taken)  # type: ignore[arg-type]  # a number, not null
        else:
            changes[index] = taken
    if t is None:
        raise TraceError(path, "is missing: seconds since the trace's start", number, TIME.name)
    if last_t is not None and t <= last_t:
        why = f"must be later than the sample before, {last_t:g}"
        raise TraceError(path, why, number, TIME.name)
    return t, changes


def _warn(message: str) -> None:
    warnings.warn(message, TornLine, stacklevel=4)
