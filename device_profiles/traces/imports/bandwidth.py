"""Import measured throughput, as a CSV with the columns t_s and mbit_s, and class and trace if any.

class,trace,t_s,mbit_s
bus,bus-1,0.0,4.04

Without the last two, a file is one trace. What was measured came down; the way up is unknown.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from device_profiles.errors import TraceError
from device_profiles.traces.format import Trace
from device_profiles.traces.imports.common import Imported, Names, read_bytes, samples_of
from device_profiles.traces.sample import MAX_T_S, Value

NEEDED = ("t_s", "mbit_s")
MAX_MBIT = 1e6
Points = list[tuple[float, dict[str, Value]]]


def import_bandwidth(paths: Sequence[Path]) -> Imported:
    """Make a trace of each class and trace.

    Raises:
        TraceError: a file can't be read, lacks a column, or has something that is no number.
    """
    names, traces, left_out = Names(), [], []
    for path in paths:
        for (kind, name), points in _read(path).items():
            label = " ".join(part for part in (kind, name) if part) or path.stem
            begin_s = min(t for t, _ in points)
            shifted = [(round(t - begin_s, 6), values) for t, values in points]
            end_s = max(t for t, _ in shifted)
            if not end_s:
                left_out.append(f"{path.name}: {label}: all of it is at one time")
                continue
            source = f"{path.name}, {label}"[:400]
            samples = samples_of(shifted, end_s)
            traces.append(Trace(names.of(label), None, source, None, samples))
    return Imported(traces, left_out)


def _read(path: Path) -> dict[tuple[str, str], Points]:
    text = read_bytes(path).decode("utf-8-sig", "replace")
    found: dict[tuple[str, str], Points] = {}
    try:
        rows = csv.DictReader(io.StringIO(text), restval="")
        columns = rows.fieldnames or []
        missing = [name for name in NEEDED if name not in columns]
        if missing:
            raise TraceError(
                path, f"has no column {' and '.join(missing)}; write class,trace,t_s,mbit_s", 1
            )
        for row in rows:
            t = _number(path, rows.line_num, row, "t_s", MAX_T_S)
            mbit = _number(path, rows.line_num, row, "mbit_s", MAX_MBIT)
            key = (row.get("class") or "", row.get("trace") or "")
            found.setdefault(key, []).append((t, {"down_mbit": mbit}))
    except csv.Error as error:
        raise TraceError(path, f"is not CSV: {error}") from None
    if not found:
        raise TraceError(path, "has no row")
    return found


def _number(path: Path, line: int, row: dict[str, str], name: str, most: float) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise TraceError(path, f"must be a number from 0 to {most:g}", line, name)
    return value
