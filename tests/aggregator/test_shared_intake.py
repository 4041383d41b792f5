"""Several processes take uploads in by shared subscriptions; killed anywhere, each counts once."""

from __future__ import annotations

import fcntl
import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregator.cli import app
from aggregator.errors import ConfigError
from aggregator.rounds import Policy
from aggregator.shared_intake import SharedIntake
from aggregator.store import Store
from aggregator.turns import FILE, Turns
from aggregator.window import ChunkWindow, StoredWindow
from protocol.events import EventLog
from protocol.faults import VARIABLE
from protocol.files import lock_folder
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, Incoming
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(300)
DEVICES, ROUNDS = ("attic", "barn", "cellar"), 3
BASE = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": (50_000, 45_000)}}
JOB = make_job(rounds=ROUNDS, ladder=[2, 4], base=BASE)
"""An update is of 6 chunks, and 7 messages: dealt in turn to two or three processes, its last one
comes to another process each time, which then counts it."""


class Fleet:
    """A serving aggregator and two intakes on one state, each started again when it was killed."""

    def __init__(self, folder: Path, broker: BrokerAddress, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.state, self._file = folder / "state", folder / "job.json"
        policy = {"min_devices": len(DEVICES), "quorum": len(DEVICES)}
        self._file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
        key = folder / "aggregator.key"
        self._common = ["--state", self.state, "--broker", broker, "--key", key, "--json"]
        self.lives: dict[str, list[Program]] = {"serve": [], "one": [], "two": []}

    def start(self, name: str, point: str = "") -> Program:
        serve = ["serve", self._file, *self._common, "--shared-intake", "--exit-when-done"]
        intake = ["intake", self._file, *self._common, "--name", name]
        arguments = serve if name == "serve" else intake
        environment = {VARIABLE: point} if point else {}
        made = Program("aggregator", arguments, self._folder, name, environment=environment)
        self.lives[name].append(self._stack.enter_context(made))
        return made

    def is_done(self) -> bool:
        """Start who was killed again, and say whether the job is finished."""
        for name, lives in self.lives.items():
            status = lives[-1].process.poll()
            if status == -signal.SIGKILL:
                self.start(name)
            elif status is not None:
                assert (name, status) == ("serve", 0), lives[-1].stderr
                return True
        return False

    def killed(self) -> set[str]:
        return {
            name
            for name, lives in self.lives.items()
            if any(life.process.poll() == -signal.SIGKILL for life in lives)
        }


@pytest.mark.parametrize(
    ("serving", "taking_in"),
    [
        ("", ""),
        ("aggregator.messages.handled:4", "aggregator.messages.handled:3"),
        ("aggregator.messages.committed:3", "aggregator.messages.committed:4"),
        ("aggregator.upload.settling", "aggregator.upload.settling"),
        ("aggregator.upload.kept", "aggregator.upload.kept"),
        ("aggregator.round.settling", "aggregator.messages.acked:5"),
    ],
)
def test_every_update_counts_once_whoever_is_killed(
    tmp_path: Path,
    mosquitto: BrokerAddress,
    monkeypatch: pytest.MonkeyPatch,
    serving: str,
    taking_in: str,
) -> None:
    # What a killed process had is asked for when the device offers its update again.
    monkeypatch.setattr("edge_client.sender.RESEND_S", 1.0)
    with ExitStack() as stack:
        fleet = Fleet(tmp_path, mosquitto, stack)
        fleet.start("serve", serving).wait_for("serving")
        for name in ("one", "two"):
            fleet.start(name, taking_in).wait_for("taking-in")
        devices = [
            LightDevice(mosquitto, tmp_path / name, name, JOB, lambda now: 1e-4) for name in DEVICES
        ]
        for device in devices:
            stack.callback(device.close)
        run_until(fleet.is_done, *devices)
        for name in ("one", "two"):
            assert fleet.lives[name][-1].end(signal.SIGTERM) == 0, fleet.lives[name][-1].stderr
        killed = fleet.killed()
        counting = {n for n, lives in fleet.lives.items() if any(x.of("counted") for x in lives)}
        assert [d.events("rejected") for d in devices] == [[], [], []]
        assert [d.outbox.pending() for d in devices] == [[], [], []]
        assert [d.trained for d in devices] == [[(n, 0) for n in (1, 2, 3)]] * 3
    assert bool(killed) == bool(serving), "the point was passed"
    assert serving or len(counting) > 1, "uploads are shared"
    with closing(sqlite3.connect(tmp_path / "state" / "store.sqlite")) as db:
        rows = db.execute("SELECT device, round, state FROM uploads ORDER BY round, device")
        expected = [(name, n, "counted") for n in (1, 2, 3) for name in DEVICES]
        assert rows.fetchall() == expected
        merged = {n: json.loads(w) for n, w in db.execute("SELECT number, weights FROM rounds")}
    third = pytest.approx(1 / 3)
    assert merged == {n: dict.fromkeys(DEVICES, third) for n in (1, 2, 3)}
    assert not [*(tmp_path / "state" / "uploads").iterdir()], "no part is left"


def is_taken(folder: Path) -> bool:
    with (folder / FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_one_process_at_a_time_has_the_turn(tmp_path: Path) -> None:
    mine, others = Turns(tmp_path), Turns(tmp_path)
    with mine.take(), mine.take():
        assert is_taken(tmp_path)
        with others.take(wait=False) as had:
            assert not had
    assert not is_taken(tmp_path)
    with others.take():
        pass


@pytest.fixture
def windows(tmp_path: Path) -> Iterator[tuple[ChunkWindow, StoredWindow, StoredWindow]]:
    stores = [Store(tmp_path / "state") for _ in range(2)]
    yield ChunkWindow(), stores[0].window, stores[1].window
    for store in stores:
        store.close()


def test_two_processes_ask_for_what_one_would(
    windows: tuple[ChunkWindow, StoredWindow, StoredWindow],
) -> None:
    alone, one, two = windows
    missing = [n for n in range(70) if n != 13]
    asked = alone.ask("d", "u", missing)
    assert one.ask("d", "u", missing) == asked
    coming = list(asked)
    for turn, number in enumerate(coming):  # grows
        more = alone.arrived("d", "u", number)
        assert (one, two)[turn % 2].arrived("d", "u", number) == more
        coming += more
    assert sorted(coming) == missing
    assert two.arrived("d", "other", 3) == alone.arrived("d", "other", 3) == []
    assert two.ask("d", "other", [1, 2]) == [1, 2]
    assert one.arrived("d", "u", 5) == [], "a device has one upload open"


def test_what_an_intake_needs_is_said(tmp_path: Path, mosquitto: BrokerAddress) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({**JOB.model_dump(), "policy": {"quorum": 3}}))
    arguments = ["intake", file, "--state", tmp_path / "state", "--broker", mosquitto]
    for name, said in (("1", "no job has been served"), ("a b", "can't name an intake")):
        with Program("aggregator", [*arguments, "--name", name], tmp_path, "intake") as made:
            assert made.wait() == 1
            assert said in made.stderr
    serve = ["serve", file, "--state", tmp_path / "state", "--shared-intake"]
    with Program("aggregator", serve, tmp_path, "aggregator") as made:
        assert made.wait() == 1
        assert "--shared-intake: sharing uploads needs a broker" in made.stderr


def test_an_intake_is_of_the_job_that_is_served_and_by_its_policy(
    tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    store, key = Store(tmp_path), SigningKey.generate()
    store.bind_job(JOB)
    events = EventLog(as_json=True)
    said = f"is the state of job {JOB.job!r}, the job file of 'other'"
    with pytest.raises(ConfigError, match=said):
        SharedIntake("1", "other", store, mosquitto, events, key=key)
    intake = SharedIntake("1", JOB.job, store, mosquitto, events, key=key)
    message = Incoming("tunefleet/none", b"", False, 0, 1)
    for policy in (Policy(late_updates=2), Policy(buffer=3)):
        store.set_policy(policy)  # as the serving process does that reads its job file again
        intake._deal_with(message)
        assert intake._intake.policy == policy
    with lock_folder(tmp_path / "intakes" / "1", "intake"):
        file = tmp_path / "job.json"
        file.write_text(JOB.model_dump_json())
        command = ["intake", str(file), "--name", "1", "--broker", str(mosquitto)]
        ran = CliRunner().invoke(app, [*command, "--state", str(tmp_path)])
        assert "end it, or give this one another --name" in str(ran.exception)
