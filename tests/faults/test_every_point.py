"""The short form of `make faults`: everybody is killed at every named point; nothing is lost."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import protocol
from protocol.faults import POINTS, chosen_point
from tests.conftest import MOSQUITTO
from tests.faults.rig import Blow, Killer, running
from tests.faults.rows import AT_FIRST, PERSONAL_ALONE

ROOT = Path(protocol.__file__).parent.parent


def test_each_point_is_passed_at_one_place_and_is_in_the_registry() -> None:
    sources = [
        path.read_text()
        for package in ("protocol", "edge_client", "aggregator")
        for path in (ROOT / package).rglob("*.py")
    ]
    passed = [name for text in sources for name in re.findall(r'fault_point\("(.*?)"\)', text)]
    assert sorted(passed) == sorted(POINTS)


def test_a_point_costs_nothing_unset_and_a_wrong_name_is_refused() -> None:
    chosen_point("")("device.outbox.put")
    for wrong in ("device.outbox.putt", "device.outbox.put:x", ":1"):
        with pytest.raises(SystemExit, match="no such fault point"):
            chosen_point(wrong)


@pytest.mark.timeout(600)  # seconds where nobody else uses the machine: below 90
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_nothing_is_lost_or_counted_twice_wherever_anybody_is_killed(tmp_path: Path) -> None:
    not_here = (*AT_FIRST, *PERSONAL_ALONE)
    here = [p for p in POINTS if p not in not_here and not p.startswith("device.")]
    there = [p for p in POINTS if p.startswith("device.")]
    with running(tmp_path / "fleet", seed=0) as rig:
        for point in AT_FIRST:
            rig.begin(point)
        killers = [
            Killer(rig, rig.aggregator, [Blow(f"{point}:1") for point in here]),
            Killer(rig, rig.broker, [Blow(after_s=3.0, number=n) for n in (signal.SIGKILL,) * 3]),
        ]
        for number, device in enumerate(rig.devices.values()):
            mine = there[number :: len(rig.devices)]
            killers.append(Killer(rig, device, [Blow(f"{point}:1") for point in mine]))
        rig.run(killers)
        rig.wait_for_rounds(2)
        found = rig.auditor.audit()
        said = [text for service in rig.services for text in service.complaints()]
    assert not found.problems and not said
    assert found.sent == found.once >= 3
    assert (found.twice, found.lost) == (0, 0)
    assert sum(k.dealt for k in killers) == len(here) + len(there) + 3
