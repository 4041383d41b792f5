"""A fleet's daemon is asked to let devices in and to put them out, while it serves two jobs."""

from __future__ import annotations

import json
import signal
from datetime import datetime, timezone
from pathlib import Path

import pytest

from aggregator.control import Revoke, ask
from aggregator.enrolling import enrol
from aggregator.errors import ControlRefused
from aggregator.view import StateView
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program
from tests.security.fleet import Fleet

pytestmark = pytest.mark.timeout(180)


def test_in_and_out_of_a_fleet_of_two_jobs(fleet: Fleet, tmp_path: Path) -> None:
    folder = fleet.folder
    jobs = [make_job(ladder=[2], rounds=40).model_copy(update={"job": n}) for n in ("notes", "two")]
    for job in jobs:
        (folder.path / f"{job.job}.json").write_text(job.model_dump_json())
    (folder.path / "fleet.toml").write_text('dir = "."\njobs = ["notes.json", "two.json"]\n')
    arguments = ["serve", "-c", folder.path / "fleet.toml", "--enroll-port", 0, "--json"]
    with Program("aggregator", arguments, tmp_path, "daemon") as daemon:
        daemon.wait_for("serving", job="two")
        now = datetime.now(timezone.utc)
        token = enrol(folder, "desk", hours=1, by="test", now=now)
        registry = folder.registry()
        assert registry.check_token(token.digest, "keys", now=now.timestamp()).device == "desk"
        for name in ("devices.sqlite", "daemon.sqlite"):
            kept = b"".join(p.read_bytes() for p in (folder.path / "state").glob(f"{name}*"))
            assert token.secret not in kept
            assert str(token)[-30:].encode() not in kept, "its end is all of the secret"
        registry.close()
        with pytest.raises(ControlRefused, match="up to 2160 hours"):
            enrol(folder, "desk", hours=0, by="test", now=now)

        files = fleet.join("kitchen")
        place = fleet.devices / "kitchen"
        device = LightDevice(
            folder.broker_here, place, "kitchen", jobs[0], lambda _: 0.01, tls=files
        )
        state = folder.state("notes")
        run_until(lambda: _delivered(state) >= 2, device)
        with StateView(state) as view:
            assert [one.revoked for one in view.devices()] == [False]
        said = ask(folder.path / "state", Revoke("kitchen"), by="test")
        assert said.fields == {"device": "kitchen", "joined": True}
        with StateView(state) as view:
            (one,) = view.devices()
            assert one.revoked and one.waiting_for.startswith("revoked")
            assert view.ready() == set() and view.job().devices.ready == 0
        with pytest.raises(ControlRefused, match="there is no device 'nobody'") as refused:
            ask(folder.path / "state", Revoke("nobody"), by="test")
        assert refused.value.code == "unknown"
        device.close()
        assert daemon.end(signal.SIGTERM) == 0
        commands = [e["command"] for e in daemon.of("command")]
        assert commands == ["enrol", "revoke"], json.dumps(daemon.events[-5:])


def _delivered(state: Path) -> int:
    with StateView(state) as view:
        return len(view.rounds())
