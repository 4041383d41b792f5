"""Personal adapters under fire: whoever is killed, each device trains what it was meant to."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import MOSQUITTO
from tests.faults.audit_personal import SETTINGS, PersonalAuditor
from tests.faults.rig import Blow, Killer, running
from tests.faults.rows import PERSONAL_ALONE

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.mark.timeout(600)
def test_each_device_trains_its_own_adapter_whoever_is_killed(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", seed=1, auditor=PersonalAuditor, **SETTINGS) as rig:
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
        found = rig.auditor.audit()
        said = [text for service in rig.services for text in service.complaints()]
    assert not said and not found.problems
    assert found.sent == found.once >= 9
    assert (found.twice, found.lost) == (0, 0)
    assert isinstance(rig.auditor, PersonalAuditor) and rig.auditor.own >= 6
