"""What became of every update of a job with personal adapters, by records and by ledgers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.audit import Found, Line, Version, read_ledger, tables

SETTINGS: dict[str, Any] = {
    "rule": "trust-validation",
    "rule_settings": {"candidates": 2},
    "remainder": "frozen",
    "directions": "rotating",
}
"""Of the job that is audited."""


class PersonalAuditor:
    """Audit a running fleet, each merged round once.

    What a device trained on is what the manifest of its round's version gave it, bit for bit; what
    counted is what it made; and who is mixed, once each, is who counted.
    """

    def __init__(self, aggregator: Path, devices: dict[str, Path]) -> None:
        self._aggregator, self._devices = aggregator, devices
        self._audited = 0
        self.own = 0
        """Updates so far that started from a device's own adapter."""

    def audit(self) -> Found:
        """Compare ledgers and records for the rounds merged since the last audit."""
        found = Found()
        ledgers = {name: read_ledger(path) for name, path in self._devices.items()}
        trust = dict(self._rows("SELECT round, matrix FROM trust"))
        for upload, reason in self._rows(
            "SELECT upload, reason FROM uploads WHERE state = 'rejected'"
        ):
            found.rejected += 1
            found.problems.append(f"{upload} is refused: {reason}")
        for number in sorted(number for number in trust if number > self._audited):
            lines = {
                name: [line for line in each if line.get("round") == number]
                for name, each in ledgers.items()
            }
            done = {name: _uploads(each, "done") for name, each in ledgers.items()}
            self._round(number, json.loads(trust[number])["devices"], lines, done, found)
            self._audited = number
        return found

    def _round(
        self,
        number: int,
        mixed: list[str],
        lines: dict[str, list[Line]],
        done: dict[str, set[str]],
        found: Found,
    ) -> None:
        """Check one merged round."""
        found.rounds += 1
        texts = self._rows(
            "SELECT device, manifest FROM uploads WHERE state = 'counted' AND round = ?", number
        )
        counted = {device: json.loads(text) for device, text in texts}
        times = Counter(mixed)
        if set(times) != set(counted):
            found.problems.append(f"round {number} mixed {mixed}, counted are {sorted(counted)}")
        for device, each in lines.items():
            made = _uploads(each, "made")
            found.sent += bool(made)
            found.once += bool(made) and times[device] == 1
            found.twice += times[device] > 1
            known = {counted[device]["upload"]} if device in counted else set()
            found.lost += len((made & done[device]) - known)
            if device in counted:
                self._trained(number, device, counted[device], each, found)

    def _trained(
        self, number: int, device: str, manifest: Line, lines: list[Line], found: Found
    ) -> None:
        """Check that what counted is what the device made of what it was given."""
        if manifest["file"]["sha256"] not in {line.get("sha256") for line in lines}:
            found.problems.append(f"{device} counts in round {number} with what it never made")
        version = manifest["version"]
        [(text,)] = self._rows("SELECT manifest FROM versions WHERE version = ?", version)
        given = json.loads(text)["personal"].get(device)
        held = Version(self._aggregator, given or version, device if given else "")
        trained = {line["digest"] for line in lines if line["what"] == "trained"}
        if manifest["personal"] != given or trained != {held.digest}:
            found.problems.append(f"{device} trained round {number} on what was not its own")
        self.own += given is not None

    def _rows(self, query: str, *given: object) -> list[Any]:
        with tables(self._aggregator) as db:
            return db.execute(query, given).fetchall()


def _uploads(lines: list[Line], what: str) -> set[str]:
    return {line["upload"] for line in lines if line["what"] == what}
