"""Import logs of sbc-bench: clocks, load and temperature of a board that works hard.

System health while running tinymembench:

Time        fake/real   load %cpu %sys %usr %nice %io %irq   Temp
11:22:38: 2400/2400MHz  0.70  24%   0%  24%   0%   0%   0%  41.4°C

Its load is the benchmark's own, which to a device that trains is that of others. It counts as
throttled where its clock is below 95 % of the log's highest: sbc-bench turns frequency scaling off.
Memory is what `free -h` said before the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_profiles.errors import TraceError
from device_profiles.traces.format import Trace
from device_profiles.traces.imports.common import Imported, Names, read_bytes, samples_of
from device_profiles.traces.sample import Value

LICENCE = "BSD-3-Clause (ThomasKaiser/sbc-bench)"
DAY_S = 86400.0
SLOW_SHARE = 0.95
HEALTH = re.compile(r"^System health while running .*:\s*$")
HEADER = re.compile(r"^Time\s+(?P<clocks>\S+)\s+load\s+%cpu")
ROW = re.compile(
    r"^(\d\d):(\d\d):(\d\d): +(?P<mhz>\d{1,6}(?:/ *\d{1,6})*)MHz\s+[\d.]{1,9}\s+(?P<cpu>\d{1,4})%"
    r"(?:.{0,200}?\s(?P<temp>-?\d{1,4}(?:\.\d{1,4})?)\s*°C)?",
    re.ASCII,
)
AVAILABLE = re.compile(
    r"^Mem:(?:\s+[\d.]{1,12}[BKMGT]i?){5}\s+(?P<size>\d{1,9}(?:\.\d{1,3})?)(?P<unit>[BKMGT])i?\s*$",
    re.ASCII,
)
MIB = {"B": 2**-20, "K": 2**-10, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a board's health."""

    t: float
    mhz: tuple[int, ...]
    cpu_load: float
    temperature_c: float | None


def import_sbc_bench(paths: Sequence[Path]) -> Imported:
    """Make a trace of each log.

    Raises:
        TraceError: a log can't be read, or none of it is a board's health.
    """
    names, traces, left_out = Names(), [], []
    for path in paths:
        lines = read_bytes(path).decode("utf-8", "replace").splitlines()
        if not lines or not lines[0].startswith("sbc-bench"):
            raise TraceError(path, "is no log of sbc-bench; the first line would begin so", 1)
        rows = list(_rows(lines))
        if len(rows) < 2:
            left_out.append(f"{path.name}: it has no lines of a board's health")
            continue
        title = lines[0].removesuffix(":").strip()[:200]
        source = f"{title}, {path.name}"
        samples = samples_of(_changes(rows, _available_mib(lines)), rows[-1].t)
        traces.append(Trace(names.of(path.stem), None, source, LICENCE, samples))
    return Imported(traces, left_out)


def _rows(lines: Sequence[str]) -> Iterator[_Row]:
    """Yield the lines of a board's health, in seconds since the first."""
    first, days, last, inside, real = 0.0, 0.0, -1.0, False, False
    for line in lines:
        if HEALTH.match(line):
            inside = True
        elif header := HEADER.match(line):
            real = header["clocks"] == "fake/real"
        elif inside and (row := ROW.match(line)):
            at = 3600.0 * int(row[1]) + 60.0 * int(row[2]) + int(row[3])
            if last < 0:
                first = at
            elif at < last - DAY_S / 2:
                days += DAY_S  # past midnight
            last = at
            clocks = tuple(int(mhz) for mhz in row["mhz"].split("/"))
            celsius = float(row["temp"]) if row["temp"] else None
            yield _Row(
                at + days - first,
                clocks[-1:] if real else clocks,
                min(1.0, int(row["cpu"]) / 100),
                celsius if celsius is not None and -60 <= celsius <= 200 else None,
            )
        elif line.startswith("#"):
            inside = False


def _changes(
    rows: Sequence[_Row], available_mib: float | None
) -> Iterator[tuple[float, dict[str, Value]]]:
    groups = max(len(row.mhz) for row in rows)
    highest = [max(row.mhz[i] for row in rows if i < len(row.mhz)) for i in range(groups)]
    yield 0.0, {"power": "mains", "memory_available_mib": available_mib}
    for row in rows:
        slow = any(mhz < SLOW_SHARE * top for mhz, top in zip(row.mhz, highest, strict=False))
        yield (
            row.t,
            {
                "cpu_load": row.cpu_load,
                "temperature_c": row.temperature_c,
                "throttled": slow,
            },
        )


def _available_mib(lines: Sequence[str]) -> float | None:
    """Return what `free -h` called available before the run, None where it has no such column."""
    for line in lines:
        if found := AVAILABLE.match(line):
            return round(float(found["size"]) * MIB[found["unit"]], 1)
        if HEALTH.match(line):
            return None
    return None
