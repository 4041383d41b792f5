"""Hours of the week in which a device may train, as its owner writes them.

    "22:00-07:00"             every day from ten in the evening to seven in the next morning
    "sat-sun 00:00-24:00"     Saturdays and Sundays
    "mon,wed 12:00-13:30"

A window belongs to the day on which it begins. Times are the device's local ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MIN = 24 * 60
_WINDOW = re.compile(r"(?:([a-z,-]+) +)?(\d\d?):(\d\d) *- *(\d\d?):(\d\d)")
_FORM = "'22:00-07:00', or 'sat-sun 09:00-18:30' for some days"


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, minutes after the midnight that each of `days` (0: Monday) begins."""

    days: frozenset[int]
    start_min: int
    end_min: int
    """Over DAY_MIN where it ends on the next day."""


def parse_window(text: str) -> Window:
    """Read a window.

    Raises:
        ValueError: it is none; says how one is written.
    """
    found = _WINDOW.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a window of hours: write {_FORM}")
    days, *numbers = found.groups()
    start_h, start_m, end_h, end_m = (int(number) for number in numbers)
    start, end = start_h * 60 + start_m, end_h * 60 + end_m
    if start >= DAY_MIN or end > DAY_MIN or start_m > 59 or end_m > 59:
        raise ValueError(f"{text!r}: a day has the times 00:00 to 24:00")
    if start == end:
        raise ValueError(f"{text!r} is no time at all; a whole day is 00:00-24:00")
    return Window(_days(days, text), start, end if end > start else end + DAY_MIN)


def is_within(windows: Sequence[Window], now: datetime) -> bool:
    """Say whether a time lies in one of the windows."""
    minute = now.hour * 60 + now.minute
    return any(
        (now.weekday() - before) % 7 in window.days
        and window.start_min <= minute + before * DAY_MIN < window.end_min
        for window in windows
        for before in (0, 1)
    )


def next_start(windows: Sequence[Window], now: datetime) -> datetime:
    """Return when the next of the windows begins after a time."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    starts = [
        midnight + timedelta(days=day, minutes=window.start_min)
        for window in windows
        for day in range(8)
        if (now.weekday() + day) % 7 in window.days
    ]
    return min(start for start in starts if start > now)


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"{whole!r}: days are {', '.join(DAYS)}, say 'mon-fri' or 'sat,sun'")
        start, end = DAYS.index(first), DAYS.index(last or first)
        days |= {(start + n) % 7 for n in range((end - start) % 7 + 1)}
    return frozenset(days)
