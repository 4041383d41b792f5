"""Import the state traces of FLASH (Yang et al., WWW 2021), which are JSON.

{"0": {"guid": "…", "model": "…", "messages": "2020-01-28 07:01:02\\twifi\\n2020-01-28 …"}}

Of its states these become fields: battery_charged_on and _off (power), a percentage (battery),
wifi (online, not metered), 2G to 5G (online, metered), Unknown and phone_off (not online). Whether
a screen is on or locked has no field here. Until a state was told the device is not online, and
what feeds it unknown. Time 0 is the midnight before the first message of all devices, so that all
days lie over each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from device_profiles.errors import TraceError
from device_profiles.traces.format import Trace
from device_profiles.traces.imports.common import Imported, Names, read_bytes, samples_of
from device_profiles.traces.sample import Value

LICENCE = "BSD-2-Clause (PKU-Chengxu/FLASH)"
STAMP = "%Y-%m-%d %H:%M:%S"
STATES: dict[str, dict[str, Value]] = {
    "battery_charged_on": {"power": "mains"},
    "battery_charged_off": {"power": "battery"},
    "wifi": {"online": True, "metered": False},
    **{mobile: {"online": True, "metered": True} for mobile in ("2g", "3g", "4g", "5g")},
    "unknown": {"online": False},
    "phone_off": {"online": False},
}
NO_FIELD = ("screen_on", "screen_off", "screen_lock", "screen_unlock", "phone_on", "battery_low")
IGNORED = frozenset((*NO_FIELD, "battery_okay"))
Message = tuple[datetime, dict[str, Value]]


def import_flash(paths: Sequence[Path]) -> Imported:
    """Make a trace of each device.

    Raises:
        TraceError: a file can't be read, or is not of this format.
    """
    told: list[tuple[str, str, list[Message]]] = []
    left_out: list[str] = []
    for path in paths:
        for device, fields in _devices(path).items():
            try:
                told.append((path.name, device, _messages(fields)))
            except ValueError as error:
                left_out.append(f"{path.name}: device {device:.40}: {error}")
    if not told:
        return Imported([], left_out)
    first = min(messages[0][0] for _, _, messages in told)
    midnight = first.replace(hour=0, minute=0, second=0)
    names = Names()
    traces = []
    for file, device, messages in told:
        changes = [((at - midnight).total_seconds(), values) for at, values in messages]
        end_s = changes[-1][0]
        source = f"FLASH, {file}, device {device:.40}"
        samples = samples_of([(0.0, {"online": False}), *changes], end_s)
        traces.append(Trace(names.of(f"flash-{device:.40}"), None, source, LICENCE, samples))
    return Imported(traces, left_out)


def _devices(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError):
        raise TraceError(path, "is not JSON") from None
    if not isinstance(found, dict) or not found:
        raise TraceError(path, 'is not an object of {"messages": …} for each device')
    return found


def _messages(fields: object) -> list[Message]:
    """Return what a device told when, in order of time.

    Raises:
        ValueError: it has no messages, or one can't be read; says which.
    """
    text = fields.get("messages") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise ValueError('it has no "messages"')
    found: list[Message] = []
    for line in text.replace("\0", "").splitlines():
        if line.strip():
            stamp, _, state = line.strip().partition("\t")
            found.append((_time(stamp, line), _values(state.strip().lower(), line)))
    if not found:
        raise ValueError("it told nothing")
    found.sort(key=lambda message: message[0])
    if found[0][0] == found[-1][0]:
        raise ValueError("all its messages are of one second")
    return found


def _time(stamp: str, line: str) -> datetime:
    try:
        return datetime.strptime(stamp.strip(), STAMP)
    except ValueError:
        raise ValueError(f"no time in {line.strip()[:60]!r}") from None


def _values(state: str, line: str) -> dict[str, Value]:
    if state in IGNORED:
        return {}
    if state in STATES:
        return STATES[state]
    try:
        percent = float(state.removesuffix("%")) if state.endswith("%") else math.nan
    except ValueError:
        percent = math.nan
    if not 0 <= percent <= 100:
        raise ValueError(f"no state that FLASH has in {line.strip()[:60]!r}")
    return {"battery_percent": percent}
