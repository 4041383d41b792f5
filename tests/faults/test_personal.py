"""Personal adapters under fire: whoever is killed, each device trains what it was meant to."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MOSQUITTO
from tests.faults.audit import Version, read_ledger
from tests.faults.rig import Blow, Killer, Rig, running
from tests.faults.rows import PERSONAL_ALONE

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
SETTINGS: dict[str, Any] = {
    "rule": "trust-validation",
    "rule_settings": {"candidates": 2},
    "remainder": "frozen",
    "directions": "rotating",
}


def rows(rig: Rig, query: str) -> list[Any]:
    uri = f"file:{rig.folder / 'aggregator' / 'store.sqlite'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=30)) as db:
        return db.execute(query).fetchall()


def audit(rig: Rig) -> tuple[int, int]:
    """Check all merged rounds; return how many updates started from an own adapter, and how many.

    What a device trained on is what the manifest of its round's version gave it, bit for bit; what
    counted is what it made; and who is mixed is who counted.
    """
    state = rig.folder / "aggregator"
    versions = {n: json.loads(m) for n, m in rows(rig, "SELECT version, manifest FROM versions")}
    trust = {n: json.loads(m) for n, m in rows(rig, "SELECT round, matrix FROM trust")}
    counted: dict[int, dict[str, Any]] = {}
    for number, text in rows(rig, "SELECT round, manifest FROM uploads WHERE state = 'counted'"):
        manifest = json.loads(text)
        counted.setdefault(number, {})[manifest["device"]] = manifest
    assert rows(rig, "SELECT upload, reason FROM uploads WHERE state = 'rejected'") == []
    ledgers = {name: read_ledger(rig.folder / name) for name in rig.devices}
    own = every = 0
    for number, matrix in trust.items():
        assert matrix["devices"] == sorted(counted[number])
        for device, manifest in counted[number].items():
            given = versions[manifest["version"]]["personal"].get(device)
            assert manifest["personal"] == given, (number, device)
            held = Version(state, given or manifest["version"], device if given else "")
            lines = [line for line in ledgers[device] if line.get("round") == number]
            made = {line["sha256"] for line in lines if line["what"] == "made"}
            trained = {line["digest"] for line in lines if line["what"] == "trained"}
            assert held.digest in trained and trained == {held.digest}, (number, device)
            own, every = own + (given is not None), every + 1
            assert manifest["file"]["sha256"] in made
    return own, every


@pytest.mark.timeout(600)
def test_each_device_trains_its_own_adapter_whoever_is_killed(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", seed=1, **SETTINGS) as rig:
        rig.begin()
        rig.wait_for_rounds(1)
        around = ("aggregator.version.publishing", "aggregator.round.settling")
        points = [f"{p}:{n}" for p in PERSONAL_ALONE for n in (1, 2)] + [f"{p}:1" for p in around]
        killers = [
            Killer(rig, rig.aggregator, [Blow(point) for point in points]),
            Killer(rig, rig.broker, [Blow(after_s=2.0, number=signal.SIGKILL)] * 2),
        ]
        for device in rig.devices.values():
            mine = ("device.version.checked:2", "device.outbox.put:1")
            killers.append(Killer(rig, device, [Blow(point) for point in mine]))
        rig.run(killers)
        rig.wait_for_rounds(2)
        own, every = audit(rig)
        said = [text for service in rig.services for text in service.complaints()]
    assert not said
    assert every >= 9 and own >= 6, (own, every)
