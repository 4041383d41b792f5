"""A job that was begun, kept as JSON, maybe by an earlier version: is it the one that is given now?

A setting that the earlier version did not know has its default. So an aggregator or a device that
is brought up to date goes on with its jobs.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from protocol.messages import Job
from protocol.mistakes import first_mistake, shown


def difference(kept: str, given: Job) -> str | None:
    """Return the job that was kept and what of it is not as in the one given; None if nothing is.

    For example "'notes', where training.steps is 50, not 60", or "'notes', not 'letters'".
    """
    try:
        was = Job.model_validate_json(kept)
    except ValidationError as error:
        return f"{json.loads(kept)['job']!r}, begun by another version: {first_mistake(error)}"
    if was == given:
        return None
    if was.job != given.job:
        return f"{was.job!r}, not {given.job!r}"
    before, now = _flat(was.model_dump(mode="json")), _flat(given.model_dump(mode="json"))
    name = next(n for n in {**before, **now} if n not in before or before[n] != now.get(n))
    one, other = (shown(of[name]) if name in of else "unset" for of in (before, now))
    return f"{was.job!r}, where {name} is {one}, not {other}"


def _flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Return nested settings by their names with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{within}{name}.") if inner else {f"{within}{name}": value}
    return flat
