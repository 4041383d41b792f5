"""What became of every update, by the aggregator's records and by the devices' ledgers.

Nothing of the code under test is asked: tables are read with SQL of this file's own, versions with
safetensors' reader, and the mark of each update is looked for in what was merged.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.faults.device import ROWS, ramp

Line = dict[str, Any]
TOLERANCE = 2e-5
"""Of a mean of marks (1e-3 to 3e-3): less than any one of them adds to it."""


@dataclass
class Found:
    """What an audit came to; `problems` are breaches of what was promised, in words."""

    sent: int = 0
    once: int = 0
    twice: int = 0
    lost: int = 0
    rejected: int = 0
    rounds: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Records:
    """The aggregator's tables, as they stand."""

    round: int
    uploads: dict[str, tuple[str, int, str, str, str]]
    """Upload → device, round, state, SHA-256 of its file, reason."""
    merged: dict[int, tuple[int, dict[str, float]]]
    """Round → version, weights."""


def tables(state: Path) -> closing[sqlite3.Connection]:
    """Open the aggregator's tables, to read alone."""
    uri = f"file:{state / 'store.sqlite'}?mode=ro"
    return closing(sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None))


def read_records(state: Path) -> Records:
    with tables(state) as db:
        db.execute("BEGIN")  # one picture of all tables
        rows = db.execute("SELECT value FROM meta WHERE key = 'round'").fetchone()
        uploads = {
            upload: (device, number, state, json.loads(manifest)["file"]["sha256"], reason)
            for upload, device, number, state, manifest, reason in db.execute(
                "SELECT upload, device, round, state, manifest, reason FROM uploads"
            )
        }
        merged = {
            number: (version, json.loads(weights))
            for number, version, weights in db.execute(
                "SELECT number, version, weights FROM rounds"
            )
        }
    return Records(json.loads(rows[0])["number"], uploads, merged)


def read_ledger(device: Path) -> list[Line]:
    path = device / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Version:
    """An adapter as it lies in the aggregator's files: modules × directions of both factors."""

    def __init__(self, state: Path, number: int, own_of: str = "") -> None:
        """`own_of` names the device whose own adapter of that version it is."""
        folder = state / "versions" / str(number)
        if own_of:
            folder = state / "personal" / str(number) / "personal" / own_of
        bands = sorted(folder.glob("*-*.safetensors"), key=lambda p: int(p.stem.split("-")[0]))
        files = [load_file(path) for path in bands]
        self.a = np.concatenate([t for f in files for n, t in f.items() if n[0] == "A"], axis=1)
        self.b = np.concatenate([t for f in files for n, t in f.items() if n[0] == "B"], axis=2)

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for a, b in zip(self.a, self.b, strict=True):
            found.update(np.ascontiguousarray(a).tobytes())
            found.update(np.ascontiguousarray(b).tobytes())
        return found.hexdigest()

    def mean_mark(self, before: Version) -> float | None:
        """Return the one number by whose ramp this version differs from another, if one does."""
        marks = []
        for after, old in ((self.a, before.a), (self.b, before.b)):
            steps = np.stack([ramp(m.shape, n) for n, m in enumerate(old)])
            change = after.astype(np.float64) - old
            marks.append(float((change * steps).sum() / (steps * steps.astype(np.float64)).sum()))
            if np.abs(change - marks[-1] * steps).max() > TOLERANCE:
                return None
        return marks[0] if abs(marks[0] - marks[1]) < TOLERANCE else None


class Auditor:
    """Audit a running fleet, each round once."""

    def __init__(self, aggregator: Path, devices: dict[str, Path]) -> None:
        self._aggregator, self._devices = aggregator, devices
        self._audited = 0
        self.out: set[tuple[str, int]] = set()
        """Devices and rounds that they were put out of: their update there may count, or not."""

    def audit(self) -> Found:
        """Compare ledgers and records for the rounds that have ended since the last audit."""
        found = Found()
        ledgers = {name: read_ledger(path) for name, path in self._devices.items()}
        records = read_records(self._aggregator)
        for name, lines in ledgers.items():
            self._told(name, lines, records, found)
            self._in_order(name, lines, found)
        for number in range(self._audited + 1, records.round):
            self._round(number, ledgers, records, found)
        self._audited = max(self._audited, records.round - 1)
        versions = [records.merged[n][0] for n in sorted(records.merged)]
        if any(b <= a for a, b in itertools.pairwise(versions)):
            found.problems.append(f"versions do not grow: {versions}")
        return found

    def _told(self, name: str, lines: Sequence[Line], records: Records, found: Found) -> None:
        """Check that what a device was told `done` about is counted."""
        mine = {line["upload"]: line["round"] for line in lines if line["what"] == "made"}
        for upload in {line["upload"] for line in lines if line["what"] == "done"}:
            known = records.uploads.get(upload)
            if mine.get(upload, 0) <= self._audited:
                continue
            if known is None or known[2] != "counted":
                found.lost += 1
                found.problems.append(f"{name}: {upload} is lost after `done` ({known})")

    def _in_order(self, name: str, lines: Sequence[Line], found: Found) -> None:
        rounds = [line["round"] for line in lines if line["what"] == "trained"]
        if rounds != sorted(rounds):
            found.problems.append(f"{name} went back to an older round: {rounds[-10:]}")
        done: set[str] = set()
        for line in lines:
            if line["what"] == "done":
                done.add(line["upload"])
            elif line["what"] == "trained" and line["drawn_rows"] < ROWS * len(done):
                found.problems.append(f"{name} went back in its text in round {line['round']}")

    def _round(
        self, number: int, ledgers: dict[str, list[Line]], records: Records, found: Found
    ) -> None:
        """Check one round that has ended."""
        found.rounds += 1
        if number not in records.merged:
            found.problems.append(f"round {number} has ended without a merge")
            return
        version, weights = records.merged[number]
        before = Version(self._aggregator, version - 1)
        made: dict[str, Line] = {}
        for name, lines in ledgers.items():
            for line in lines:
                if line.get("round") != number:
                    continue
                if line["what"] == "trained" and line["digest"] != before.digest:
                    found.problems.append(
                        f"{name} trained round {number} on what is not version {version - 1}"
                    )
                if line["what"] == "made":
                    made[line["sha256"]] = {**line, "device": name}
        counted: dict[str, Line] = {}
        for upload, (device, of, state, sha256, reason) in records.uploads.items():
            if of != number or device not in self._devices:
                continue
            if state != "counted" and (device, number) in self.out:
                continue
            if state != "counted":
                found.rejected += 1
                found.problems.append(f"{upload} of {device} in round {number}: {state}, {reason}")
            elif sha256 not in made:
                found.problems.append(f"{upload} of {device} is counted and nobody made it")
            else:
                counted[device] = made[sha256]
        sent = {line["device"] for line in made.values()}
        found.sent += len({d for d in sent if d in counted or (d, number) not in self.out})
        self._merge(number, Version(self._aggregator, version), before, weights, counted, found)

    def _merge(
        self,
        number: int,
        after: Version,
        before: Version,
        weights: dict[str, float],
        counted: dict[str, Line],
        found: Found,
    ) -> None:
        """Check that a version is the one before and the mean of exactly the counted updates."""
        examples = sum(line["examples"] for line in counted.values())
        shares = {name: line["examples"] / examples for name, line in counted.items()}
        if set(weights) != set(shares) or any(
            abs(weights[name] - share) > 1e-9 for name, share in shares.items()
        ):
            found.problems.append(f"round {number} weighs {weights}, its updates are {shares}")
        seen = after.mean_mark(before)
        if seen is None:
            found.problems.append(f"what was merged in round {number} is no mean of its updates")
            return
        for times in itertools.product((1, 0, 2), repeat=len(counted)):
            each = dict(zip(counted, times, strict=True))
            whole = sum(counted[n]["examples"] * k for n, k in each.items())
            mean = sum(counted[n]["mark"] * counted[n]["examples"] * k for n, k in each.items())
            if whole and abs(mean / whole - seen) < TOLERANCE:
                found.once += sum(k == 1 for k in times)
                found.twice += sum(k == 2 for k in times)
                found.lost += sum(k == 0 for k in times)
                if set(times) != {1}:
                    found.problems.append(f"round {number} merged {each}")
                return
        found.problems.append(f"the marks of round {number} do not explain what was merged")
