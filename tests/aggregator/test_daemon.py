"""`aggregator serve -c`: several jobs over one connection, asked and told what while it runs.

A real broker and a real daemon; the devices are LightDevice.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aggregator.control import CreateJob, PauseJob, ResumeJob, Revoke, RollBack, ask
from aggregator.errors import ControlRefused
from aggregator.rounds import Policy
from aggregator.store import Store
from aggregator.view import FleetReader, StateView
from protocol.messages import Job
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
JOBS = ("notes", "letters")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


class Daemon:
    """A daemon of two jobs of small rounds, and devices in them."""

    def __init__(self, folder: Path, broker: BrokerAddress, stack: ExitStack) -> None:
        self.folder, self.broker, self.stack = folder, broker, stack
        self.states = folder / "aggregator-state"
        self.settings = folder / "fleet.toml"
        for name in JOBS:
            self.write_job(name, rounds=2)
        listed = ", ".join(f'"{name}.json"' for name in JOBS)
        self.settings.write_text(f'jobs = [{listed}]\nbroker = "{broker}"\n')

    def write_job(self, name: str, policy: dict[str, Any] | None = None, **more: Any) -> Job:
        job = make_job(ladder=[2], **more).model_copy(update={"job": name})
        fields = {**job.model_dump(), "policy": policy or {}}
        (self.folder / f"{name}.json").write_text(json.dumps(fields))
        return job

    def start(self, *more: object, **environment: str) -> Program:
        arguments = ["serve", "-c", self.settings, "--json", *more]
        program = Program("aggregator", arguments, self.folder, "daemon", environment=environment)
        return self.stack.enter_context(program)

    def device(self, job: str, name: str = "kitchen") -> LightDevice:
        made = LightDevice(
            self.broker, self.folder / f"{name} in {job}", f"{name}", self.job(job), lambda _: 0.01
        )
        made.metrics = {"held_out_loss": 2.0}
        self.stack.callback(made.close)
        return made

    def job(self, name: str) -> Job:
        fields = json.loads((self.folder / f"{name}.json").read_text())
        fields.pop("policy")
        return Job.model_validate(fields)

    def told(self, *arguments: object) -> Any:
        """Return what a command of `aggregator` prints as JSON about this daemon."""
        ended = self.command(*arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aggregator", *map(str, arguments), "-c", self.settings]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def stands(self, name: str) -> tuple[int, str]:
        with StateView(self.states / name) as view:
            now = view.round_state()
            return now.number, now.state


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: BrokerAddress) -> Iterator[Daemon]:
    with ExitStack() as stack:
        yield Daemon(tmp_path, mosquitto, stack)


def wait_until(holds: Callable[[], bool], patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.05)


def test_two_jobs_are_served_and_looked_at(daemon: Daemon) -> None:
    running = daemon.start("--exit-when-done")
    for name in JOBS:
        running.wait_for("serving", job=name)
    devices = [daemon.device("notes"), daemon.device("letters", "desk")]
    run_until(lambda: all(daemon.stands(name) == (2, "finished") for name in JOBS), *devices)
    assert running.wait() == 0
    assert {e["job"] for e in running.of("merged")} == {*JOBS}
    status = daemon.told("status")
    assert [(j["name"], j["round"], j["state"]) for j in status["jobs"]] == [
        ("letters", 2, "finished"), ("notes", 2, "finished"),
    ]  # fmt: skip
    assert not status["running"]
    for name in JOBS:
        rounds = daemon.told("rounds", "--job", name)
        sizes = [m.file.bytes for d in devices for m in d.manifests.values() if m.job == name]
        assert [r["up_bytes"] for r in rounds] == sizes[::-1] and len(sizes) == 2
        assert [(r["counted"], r["loss"], r["ranks"]) for r in rounds] == [(1, 2.0, {"2": 1})] * 2
        who = "kitchen" if name == "notes" else "desk"
        shown = daemon.told("device", "show", who, "--job", name)
        assert shown["device"]["up_bytes"] == sum(sizes)
        store = Store(daemon.states / name)
        assert len(store.uploads.of_round(2, "counted")) == 1
        store.close()
    lines = daemon.command("devices", "--job", "notes").stdout.splitlines()
    assert lines[0].split()[:3] == ["device", "state", "rank"] and lines[1].startswith("kitchen")
    several = daemon.command("rounds")
    assert several.returncode == 1 and "there are several jobs here" in several.stderr
    nobody = daemon.command("job", "pause", "notes")
    assert nobody.returncode == 1 and "no aggregator serves" in nobody.stderr


def test_what_is_asked_of_a_daemon_that_runs(daemon: Daemon) -> None:
    for name in JOBS:
        daemon.write_job(name, rounds=50, policy={"min_devices": 1, "deadline_s": 900})
    running = daemon.start()
    running.wait_for("serving", job="letters")
    notes, letters = daemon.states / "notes", daemon.states / "letters"
    device = daemon.device("notes")
    run_until(lambda: daemon.stands("notes")[0] >= 2, device)
    assert daemon.told("job", "pause", "notes")["said"].startswith("paused")
    run_until(lambda: bool(device.round and device.round.fraction == 0.0), device)
    trained, stood = len(device.trained), daemon.stands("notes")
    until = time.monotonic() + 1.0
    run_until(lambda: time.monotonic() > until, device)
    assert (len(device.trained), daemon.stands("notes")) == (trained, stood), "all stands still"
    status = {job["name"]: job for job in daemon.told("status")["jobs"]}
    assert status["notes"]["paused"] is not None and status["letters"]["paused"] is None
    assert status["notes"]["process"] == running.process.pid
    ask(notes, ResumeJob(), by="test")
    run_until(lambda: daemon.stands("notes")[0] > stood[0], device)

    with StateView(notes) as view:
        newest = view.job().version
    said = ask(notes, RollBack(1), by="test")
    assert said.fields["of"] == 1 and said.fields["version"] > newest
    version = said.fields["version"]
    run_until(lambda: bool(device.round and device.round.version > version), device)
    with StateView(notes) as view:
        notes_of = {r.number: r.note for r in view.rounds()}
    assert "rolled back to version 1" in notes_of.values()

    with pytest.raises(ControlRefused, match=r"no fleet's folder"):
        ask(daemon.states, Revoke("kitchen"), by="test")
    third = daemon.write_job("third", rounds=1)
    assert (
        "is served from now on"
        in daemon.told("job", "create", daemon.folder / "third.json")["said"]
    )
    running.wait_for("serving", job="third")
    again = CreateJob(third.model_dump(mode="json"), {})
    with pytest.raises(ControlRefused, match="is served already"):
        ask(daemon.states, again, by="test")
    assert running.end(signal.SIGTERM) == 0
    assert [e["command"] for e in running.of("command")] == [
        "pause",
        "resume",
        "rollback",
        "create",
    ]

    once_more = daemon.start()
    for name in (*JOBS, "third"):
        once_more.wait_for("serving", job=name)
    assert ask(letters, PauseJob(), by="test").said.startswith("paused")
    assert once_more.end(signal.SIGKILL) == -signal.SIGKILL
    last = daemon.start()
    last.wait_for("serving", job="third")
    with StateView(letters) as view:
        assert view.job().paused is not None, "over a crash"


FAILING_RULE = """
from pathlib import Path

from aggregator.merge import RULES


def rule(view, settings):
    if not Path(settings["mended"]).exists():
        raise RuntimeError("not yet")
    return RULES["anchored"](view, {})
"""


def test_a_job_whose_rule_fails_is_held_and_the_other_goes_on(daemon: Daemon) -> None:
    package, mended = daemon.folder / "package", daemon.folder / "mended"
    metadata = package / "failing-1.0.dist-info"
    metadata.mkdir(parents=True)
    (package / "failing_rule.py").write_text(FAILING_RULE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\n")
    (metadata / "entry_points.txt").write_text("[tunefleet.rules]\nfailing = failing_rule:rule\n")
    daemon.write_job("notes", rounds=2, rule="failing", rule_settings={"mended": str(mended)})
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = daemon.start(PYTHONPATH=path)
    for name in JOBS:
        running.wait_for("serving", job=name)
    devices = [daemon.device("notes"), daemon.device("letters", "desk")]
    run_until(lambda: bool(running.of("held")), *devices)
    assert (
        "rule 'failing' (failing_rule:rule) failed: RuntimeError: not yet"
        in (running.of("held")[0]["reason"])
    )
    run_until(lambda: daemon.stands("letters") == (2, "finished"), *devices)
    assert daemon.stands("notes") == (1, "open")
    mended.touch()
    ask(daemon.states / "notes", ResumeJob(), by="test")
    run_until(lambda: daemon.stands("notes") == (2, "finished"), *devices)
    assert len(devices[0].trained) == 2, "what it had sent was kept"
    assert running.end(signal.SIGTERM) == 0


def test_settings_that_are_read_again(daemon: Daemon) -> None:
    running = daemon.start()
    running.wait_for("serving", job="letters")
    daemon.write_job("notes", rounds=3, policy={"min_devices": 4, "quorum": 3})
    daemon.settings.write_text(daemon.settings.read_text() + 'port = 7\n[log]\nlevel = "warning"\n')
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: _policy(daemon, "notes") == Policy(min_devices=4, quorum=3))
    assert _policy(daemon, "letters") == Policy()
    (daemon.folder / "letters.json").write_text("{}")
    running.process.send_signal(signal.SIGHUP)
    refused = running.wait_for("reload-refused")
    assert "letters.json" in refused["reason"]
    assert running.of("reloaded") == [], "an info, and only warnings are told now"
    (needed,) = running.of("restart-needed")
    assert needed["settings"] == ["port", "notes: rounds"]
    assert running.end(signal.SIGTERM) == 0


def _policy(daemon: Daemon, name: str) -> Policy:
    with StateView(daemon.states / name) as view:
        return view.policy()


def test_what_has_come_is_answered_before_it_ends(daemon: Daemon) -> None:
    """Stopped in the middle of an upload: what was sent is counted, now or at the next start."""
    for name in JOBS:
        daemon.write_job(name, rounds=3)
    running = daemon.start()
    running.wait_for("serving", job="letters")
    device = daemon.device("notes")
    run_until(lambda: bool(device.trained), device)  # it is in the outbox, not offered
    device.step()
    assert running.end(signal.SIGTERM) == 0
    assert running.of("stopped") != []
    daemon.start().wait_for("serving", job="letters")
    device.offer_again()
    run_until(lambda: daemon.stands("notes")[0] >= 2, device)
    assert len(device.events("rejected")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
def test_systemd_is_told(daemon: Daemon) -> None:
    name = f"tunefleet-test-{os.getpid()}-{time.monotonic_ns()}"  # in the abstract namespace
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(0.2)
        running = daemon.start(NOTIFY_SOCKET=f"@{name}")
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                try:
                    said.append(manager.recv(4096).decode())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            wait_until(lambda: "READY=1" in said)
            running.wait_for("serving", job="letters")  # the second of two
            wait_until(lambda: "WATCHDOG=1" in said)
            wait_until(lambda: any("notes: round 0 of 2, waiting" in one for one in said))
            assert running.end(signal.SIGTERM) == 0
            wait_until(lambda: "STOPPING=1" in said)
        finally:
            stop.set()
            thread.join()


def test_two_daemons_do_not_have_the_same_states(daemon: Daemon) -> None:
    daemon.start().wait_for("serving", job="letters")
    second = daemon.start()
    assert second.wait() == 1
    assert "another aggregator is running with its state in" in second.stderr
    reader = FleetReader(daemon.states)
    assert reader.fleet().running
    reader.close()
