"""The short form of `make faults`, once each: full disks, a revoked certificate, a denied topic."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MOSQUITTO
from tests.faults.rig import Rig, running
from tests.faults.rows import Fault
from tests.faults.rows_disk import full_disks
from tests.faults.rows_secure import secured
from tests.faults.secure_rig import HOUSE, SecureRig

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
]


def strike_once(rig: Rig, faults: list[Fault]) -> None:
    rig.begin()
    for fault in faults:
        row = fault.run(rig, 1)
        assert not row.problems, row
        assert row.sent == row.once, row
        assert (row.twice, row.lost) == (0, 0), row
        if row.note.startswith("a tmpfs can't be mounted"):
            pytest.skip(row.note)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", seed=0) as rig:
        strike_once(rig, full_disks())


def test_who_is_put_out_or_denied_loses_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", 0, HOUSE, kind=SecureRig) as rig:
        strike_once(rig, secured())
