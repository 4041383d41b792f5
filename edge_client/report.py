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
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from edge_client.errors import StorageError
from edge_client.notify import notify
from edge_client.outbox import Totals, look

FILE = "status.json"
WRITTEN_EVERY_S = 5.0
"""Steps are written down as often at most: memory cards wear out."""
BYTES_PER_MIB = 2**20

_TAKEN: Mapping[str, tuple[str, ...]] = {
    "job": ("name",),
    "round": ("round", "attempt", "rounds"),
    "plan": ("plan", "rank", "held", "predicted_mib", "budget_mib"),
    "stepped-down": ("plan", "predicted_mib"),
    "step": ("step", "steps", "loss"),
    "pruned": ("rank_after",),
    "evaluated": ("loss",),
    "rejected": ("reason",),
    "finished": ("loss", "kept"),
}
"""Event → what of it is told."""


class Report:
    """Write down an agent's events in its state folder, and tell the service manager."""

    def __init__(self, state: Path, device: str) -> None:
        this = psutil.Process()
        self._path = state / FILE
        self._now: dict[str, Any] = {"device": device, "pid": this.pid, "began": this.create_time()}
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
        elif name in _TAKEN:
            words = ""
            self._now[name] = {key: event[key] for key in _TAKEN[name] if key in event}
            if name in ("job", "round"):
                self._now.pop("step", None)
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


@dataclass(frozen=True, slots=True)
class Condition:
    """How a device is: what its agent wrote last, whether that still runs, what it has done."""

    told: Mapping[str, Any]
    running: bool
    totals: Totals

    def as_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.told.items() if k not in ("pid", "began")}
        return {
            **kept,
            "running": self.running,
            "updates": {"pending": self.totals.pending, "counted": self.totals.counted},
            "today": {"bytes": self.totals.bytes, "training_s": round(self.totals.training_s, 1)},
        }


def read_condition(state: Path, now: datetime) -> Condition:
    """Return how the device of a state folder is; no lock is needed, nor taken.

    Raises:
        StorageError: nobody has run with this folder, or it can't be read.
    """
    totals = look(state, now.date().isoformat())
    told = read_told(state)
    if not told and totals == Totals():
        raise StorageError(
            f"no agent has run with its state in {state}; start one with edge-client run, or name "
            "its folder with --state"
        )
    return Condition(told, is_running(told), totals)


def agent_runs(state: Path) -> bool:
    """Say whether an agent has its state in a folder now."""
    return is_running(read_told(state))


def is_running(told: Mapping[str, Any]) -> bool:
    """Say whether the process that wrote this down still is."""
    try:
        return bool(psutil.Process(told["pid"]).create_time() == told["began"])
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def read_told(state: Path) -> dict[str, Any]:
    """Return what the last agent of a state folder wrote down; nothing if there was none.

    Raises:
        StorageError: it can't be read.
    """
    try:
        told = json.loads((state / FILE).read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"can't read {state / FILE}: {error.strerror}") from None
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def in_words(condition: Condition) -> list[str]:
    """Return a device's condition as lines for its owner."""
    told, totals = condition.told, condition.totals
    state = told.get("state", "unknown") if condition.running else "not running"
    detail = told.get("detail") if condition.running else told.get("state")
    lines = [f"{told.get('device', 'this device')}: {state}"]
    if detail:
        lines[0] += f" ({detail})" if condition.running else f" (last: {detail})"
    if job := told.get("job"):
        now = told.get("round", {})
        lines.append(f"job       {job['name']}, round {now.get('round', 0)} of {now.get('rounds')}")
    if plan := told.get("plan"):
        plan = {**plan, **told.get("stepped-down", {})}
        rank = told.get("pruned", {}).get("rank_after", plan["rank"])
        lines.append(f"plan      {plan['plan']}, {plan['predicted_mib']:.0f} MiB")
        lines.append(f"rank      {rank}")
    if step := told.get("step"):
        lines.append(f"training  step {step['step']} of {step['steps']}, loss {step['loss']:.3f}")
    if loss := told.get("evaluated", {}).get("loss"):
        lines.append(f"held out  loss {loss:.3f} before this round's training")
    lines.append(f"updates   {totals.counted} counted, {totals.pending} on their way")
    lines.append(
        f"today     {totals.bytes / BYTES_PER_MIB:.1f} MiB, "
        f"{totals.training_s / 60:.1f} minutes of training"
    )
    return lines
