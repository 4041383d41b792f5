"""What happened, from the events of all processes: rounds, and each device's end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from device_profiles.processes import Event


class History:
    """Collect events into the `history` and `devices` of a summary."""

    def __init__(self) -> None:
        self._rounds: dict[int, dict[str, Any]] = {}
        self._down: dict[str, int] = defaultdict(int)
        self._down_before: dict[str, int] = defaultdict(int)
        self.serving: Event = {}
        self.plans: dict[str, Event] = {}
        self.finished: dict[str, Event] = {}
        self.pruned: list[Event] = []
        self._rejected: dict[str, tuple[int, str]] = {}

    def take(self, event: Event) -> None:
        """Take in one event; those that don't matter here change nothing."""
        kind, device = event["event"], event.get("device", "")
        if kind == "serving":
            self.serving = event
        elif kind == "plan":
            self.plans[device] = event
        elif kind == "bytes":
            self._down[device] = event["down"]
        elif kind == "evaluated":
            row = self._row(event["round"], device)
            row["loss"] = event["loss"]
            row["bytes_down"] = self._down[device] - self._down_before[device]
            self._down_before[device] = self._down[device]
        elif kind == "rejected":
            self._rejected[device] = event["round"], event["reason"]
        elif kind == "counted":
            self._rejected.pop(device, None)
            row = self._row(event["round"], device)
            row |= {
                "rank": event["rank"],
                "bytes_up": event["bytes"],
                "train_loss": event["metrics"].get("train_loss"),
            }
        elif kind == "pruned":
            self.pruned.append(event)
        elif kind == "merged":
            entry = self._round(event["round"])
            entry |= {"version": event["version"], "merge_s": event["seconds"]}
            for name, weight in event["weights"].items():
                self._row(event["round"], name)["weight"] = weight
        elif kind == "warning":
            self._round(event["round"]).setdefault("warnings", []).append(event["reason"])
        elif kind == "trust":
            kept = ("devices", "weights", "temperatures")
            self._round(event["round"])["trust"] = {key: event[key] for key in kept}
        elif kind == "finished":
            self.finished[device] = event

    def all_refused(self, devices: Sequence[str]) -> str:
        """Return why the round can't come to its end: no device's update is taken; "" if one is."""
        newest = [self._rejected.get(device, (0, "")) for device in devices]
        if (number := newest[0][0]) == 0 or any(its != number for its, _ in newest):
            return ""
        return f"every device's update of round {number} was refused: {newest[0][1]}"

    def rounds(self) -> list[dict[str, Any]]:
        """Return the rounds in order, as summaries write them."""
        return [self._rounds[number] for number in sorted(self._rounds)]

    def _round(self, number: int) -> dict[str, Any]:
        return self._rounds.setdefault(number, {"round": number, "devices": {}})

    def _row(self, number: int, device: str) -> dict[str, Any]:
        row: dict[str, Any] = self._round(number)["devices"].setdefault(device, {})
        return row
