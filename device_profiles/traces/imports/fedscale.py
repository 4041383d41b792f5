"""Import FedScale's two device traces, which are pickles.

`client_behave_trace` says when each client is there: {id: {"active": [s, …], "inactive": [s, …],
"finish_time": s, "duration": s, "model": text}}; it is there from active[i] to inactive[i], and
begins again at finish_time. `client_device_capacity` has its link: {id: {"computation": ms a
sample, "communication": kbit/s}}. With both, a client gets the link that has its place in the
other's order, as FedScale gives them out.

A pickle is a program: these are read by a machine that can't call anything, `plain_pickle.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from device_profiles.errors import TraceError
from device_profiles.traces.format import Trace
from device_profiles.traces.imports.common import Imported, Names, read_bytes, samples_of
from device_profiles.traces.imports.plain_pickle import NotPlain, load_plain
from device_profiles.traces.sample import MAX_T_S, Value

LICENCE = "Apache-2.0 (SymbioticLab/FedScale)"
KBIT_PER_MBIT = 1000.0
Change = tuple[float, dict[str, Value]]


def import_fedscale(paths: Sequence[Path]) -> Imported:
    """Make a trace of each client.

    Raises:
        TraceError: a file can't be read, or is neither of the two.
    """
    behaviours: list[tuple[Path, object, dict[Any, Any]]] = []
    links: list[dict[Any, Any]] = []
    for path in paths:
        for client, fields in _clients(path):
            if "active" in fields:
                behaviours.append((path, client, fields))
            elif "communication" in fields:
                links.append(fields)
            else:
                known = '"active" (client_behave_trace) or "communication" (client_device_capacity)'
                raise TraceError(path, f"client {_label(client)} has neither {known}")
    names, traces, left_out = Names(), [], []
    always: Iterator[tuple[Path, object, dict[Any, Any]]] = (
        (paths[0], number, {}) for number in range(len(links))
    )
    linked = itertools.cycle(links) if links else itertools.repeat({})
    for (path, client, fields), link in zip(behaviours or always, linked, strict=False):
        try:
            changes, end_s = _there(fields) if fields else ([], 0.0)
            changes.append((0.0, _link(link)))
        except ValueError as error:
            left_out.append(f"{path.name}: client {_label(client)}: {error}")
            continue
        source = f"FedScale, {path.name}, client {_label(client)}"
        name = names.of(f"fedscale-{_label(client)}")
        traces.append(Trace(name, None, source, LICENCE, samples_of(changes, end_s)))
    return Imported(traces, left_out)


def _label(client: object) -> str:
    """Return what a client is called, short whatever it is."""
    if isinstance(client, str):
        return client[:40]
    if isinstance(client, int) and abs(client) < 10**18:
        return str(int(client))
    return f"({type(client).__name__})"


def _clients(path: Path) -> list[tuple[object, dict[Any, Any]]]:
    data = read_bytes(path)
    try:
        found = load_plain(data)
    except NotPlain as error:
        why = f"is not a pickle of plain numbers and text: {error}; nothing in it was run"
        raise TraceError(path, why) from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise TraceError(path, "is not a dict of a dict for each client, as FedScale's traces are")
    if not found:
        raise TraceError(path, "has no client")
    return list(found.items())


def _there(fields: dict[Any, Any]) -> tuple[list[Change], float]:
    """Return when a client is there, and when its trace begins again.

    Raises:
        ValueError: times are missing or not in order; says which.
    """
    active, inactive = _times(fields, "active"), _times(fields, "inactive")
    ends = [*active, *inactive]
    end_s = _time(fields["finish_time"], "finish_time") if "finish_time" in fields else max(ends)
    changes: list[Change] = [(0.0, {"online": False})]
    before = -1.0
    for start, end in itertools.zip_longest(active, inactive, fillvalue=end_s):
        if not before <= start <= end:
            raise ValueError(f'"active" and "inactive" are not in turn at {start:g} s')
        before = end
        if start < end:
            changes += [(start, {"online": True}), (end, {"online": False})]
    return [change for change in changes if change[0] <= end_s], end_s


def _times(fields: dict[Any, Any], name: str) -> list[float]:
    found = fields.get(name)
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f'"{name}" is not a list of times')
    return [_time(value, name) for value in found]


def _time(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_T_S:
        raise ValueError(f'"{name}" has something that is no time in seconds')
    return float(value)


def _link(fields: dict[Any, Any]) -> dict[str, Value]:
    if not fields:
        return {}
    kbit = fields["communication"]
    if isinstance(kbit, bool) or not isinstance(kbit, int | float) or not 0 <= kbit <= 1e9:
        raise ValueError('"communication" is no speed in kbit/s')
    mbit = round(float(kbit) / KBIT_PER_MBIT, 6)
    if not math.isfinite(mbit):
        raise ValueError('"communication" is no speed in kbit/s')
    return {"down_mbit": mbit, "up_mbit": mbit}
