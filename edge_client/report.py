"""How a device is, for its owner: what its agent writes down as it goes, and `status` reads.

The agent's events are all that goes in. The file is in the state folder; with the agent's process
in it, so that nobody takes what a dead one has left for the present.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_client.errors import StorageError
from protocol.lifetime import began, is_alive
from protocol.notify import notify

FILE = "status.json"
WRITTEN_EVERY_S = 5.0
"""Steps are written down as often at most: memory cards wear out."""

_PARTS: Mapping[str, Mapping[str, type]] = {
    "job": {"name": str},
    "round": {"round": int, "attempt": int, "rounds": int},
    "plan": {
        "plan": str,
        "rank": int,
        "held": int,
        "predicted_mib": float,
        "budget_mib": float,
        "floor_mib": float,
    },
    "stepped-down": {"plan": str, "predicted_mib": float, "why": str},
    "step": {"step": int, "steps": int, "loss": float},
    "pruned": {"rank_after": int},
    "evaluated": {"loss": float},
    "rejected": {"reason": str},
    "finished": {"loss": dict, "kept": str},
    "ended": {"why": str, "time": float},
}
"""Event → what of it is written down, and of what type."""
_PLAIN: Mapping[str, type] = {"device": str, "state": str, "detail": str, "time": float}


class Report:
    """Write down an agent's events in its state folder, and tell the service manager."""

    def __init__(self, state: Path, device: str) -> None:
        pid = os.getpid()
        self._path = state / FILE
        self._now: dict[str, Any] = {"device": device, "pid": pid, "began": began(pid)}
        self._next = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in an event."""
        name = str(event["event"])
        if name == "state":
            words = str(event["state"])
            self._now["state"], self._now["detail"] = words, event.get("detail", "")
        elif name == "waiting" and "what" in event:  # for the broker, or a job
            words = f"waiting for {event['what']}"
            self._now["state"], self._now["detail"] = words, event.get("why", "")
        elif name in _PARTS:
            words = ""
            self._now[name] = {key: event[key] for key in _PARTS[name] if key in event}
            if name in ("job", "round"):
                self._now.pop("step", None)
            if name == "plan":
                self._now.pop("stepped-down", None)
        else:
            return
        if words:
            detail = self._now["detail"]
            notify(STATUS=f"{words}: {detail}" if detail else words)
        if name != "step" or time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + WRITTEN_EVERY_S
        temporary = self._path.with_name(FILE + ".tmp")
        with suppress(OSError):  # a full disk: who keeps what matters says so
            temporary.write_text(json.dumps({**self._now, "time": time.time()}))
            os.replace(temporary, self._path)


def agent_runs(state: Path) -> bool:
    """Say whether an agent has its state in a folder now."""
    return is_running(read_told(state)[0])


def is_running(told: Mapping[str, Any]) -> bool:
    """Say whether the process that wrote this down still is."""
    return is_alive(told.get("pid"), told.get("began"))


def read_told(state: Path) -> tuple[dict[str, Any], str]:
    """Return what the last agent of a state folder wrote down, and what is wrong with the file.

    Nothing if there was no agent; what is damaged, or another version wrote otherwise, is left out.

    Raises:
        StorageError: it can't be read.
    """
    path = state / FILE
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise StorageError(
            f"can't read {path}: {why}; if that is its folder, give this user the right to it"
        ) from None
    except (ValueError, RecursionError):
        return {}, f"{path} is damaged; a running agent writes it anew, else remove it"
    if not isinstance(told, dict):
        return {}, f"{path} is not an agent's; a running one writes it anew, else remove it"
    bad = [name for name in told if not _is_sound(name, told[name])]
    sound = {name: value for name, value in told.items() if name not in bad}
    why = f"left out what this version does not understand of {path}: {', '.join(bad)}"
    return sound, why if bad else ""


def _is_sound(name: str, value: object) -> bool:
    """Say whether a part of the file is as this version writes it; what is not known may stay."""
    if name in _PLAIN:
        return _is_a(value, _PLAIN[name])
    kinds = _PARTS.get(name)
    if kinds is None:
        return True
    if not isinstance(value, dict):
        return False
    return all(_is_a(value[key], kinds[key]) for key in kinds if key in value)


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)
