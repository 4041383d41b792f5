"""Commands to a running job: done once or not at all, in one transaction with their answer."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.commands import CommandTable
from aggregator.control import (
    COMMANDS,
    ChangePolicy,
    Command,
    PauseJob,
    ResumeJob,
    Revoke,
    RollBack,
    ask,
    read_command,
)
from aggregator.errors import ControlRefused, NoDaemon
from aggregator.operating import Operator
from aggregator.rounds import Policy, RoundState
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol.events import EventLog
from protocol.files import lock_folder
from protocol.messages import Job
from tests.aggregator.uploading import Aggregator, make_job

FILE = Policy(quorum=2, deadline_s=600.0)
OPEN = RoundState(3, "open", 4, 1600.0)


class Served:
    """A state with versions 1 to 4 and round 3 open, and what answers commands to it."""

    def __init__(self, folder: Path, job: Job | None = None) -> None:
        self.folder, self.job, self.now = folder, job or make_job(), 1000.0
        self.store = Store(folder)
        self.store.bind_job(self.job)
        versions = Versions(self.job, self.store)
        for number in range(1, 5):
            made = versions.write(first_version(self.job), version=number, parent=number - 1)
            self.store.add_version(made)
        self.store.set_round(OPEN)
        self.store.set_policy(FILE)
        self.log = io.StringIO()
        log = EventLog(as_json=True, stream=self.log)
        self.operator = Operator(self.job, FILE, self.store, versions, log, lambda: self.now)

    def put(self, command: Command, key: str = "k", expires: float = 2000.0) -> None:
        table = CommandTable.beside(self.folder / "store.sqlite")
        table.put(key, COMMANDS.dump_json(command).decode(), "test", at=1000.0, expires=expires)
        table.close()

    def told(self, key: str = "k") -> tuple[str, str]:
        answer = self.store.commands.answer(key)
        return answer.state, answer.code or answer.said

    def do(self, command: Command, key: str = "k") -> tuple[str, str]:
        self.put(command, key)
        self.operator.step()
        return self.told(key)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "state")
    yield made
    made.store.close()


def test_pause_and_resume(served: Served) -> None:
    assert served.do(PauseJob())[0] == "done"
    steering = served.store.steering()
    assert steering.paused == 1000.0
    assert steering.in_force(FILE).share(5) == 0.0, "nobody is asked"
    assert steering.policy(FILE) == FILE
    assert served.do(PauseJob(), "again") == ("refused", "state")
    served.now = 1500.0
    assert served.do(ResumeJob(), "resume")[0] == "done"
    assert served.store.round() == RoundState(3, "open", 4, 2100.0), "it has the time it had left"
    assert served.do(ResumeJob(), "twice") == ("refused", "state")
    assert [e["event"] for e in served.events()] == [
        "command", "command-refused", "command", "command-refused",
    ]  # fmt: skip
    assert served.events()[0]["by"] == "test"


def test_changing_the_policy(served: Served) -> None:
    assert served.do(ChangePolicy(deadline_s=60.0, quorum=5)) == (
        "done", "deadline_s = 60, quorum = 5",
    )  # fmt: skip
    assert served.store.steering().policy(FILE) == Policy(quorum=5, deadline_s=60.0)
    assert served.store.round().deadline == 1060.0, "540 s earlier than before"
    assert served.do(ChangePolicy(reset=("deadline_s",)), "reset")[0] == "done"
    assert served.store.steering().changed == {"quorum": 5}
    assert served.store.round().deadline == 1600.0
    for key, wrong, words in (
        ("a", ChangePolicy(), "name one of deadline_s"),
        ("b", ChangePolicy(quorum=0), "quorum: must be at least 1, not 0"),
        ("c", ChangePolicy(fraction=2.0), "fraction: must be at most 1"),
        ("d", ChangePolicy(reset=("rule",)), "'rule' is not one of"),
        ("e", ChangePolicy(deadline_s=math.nan), "must be at most 1000000000.0, not NaN"),
    ):
        assert served.do(wrong, key) == ("refused", "wrong")
        assert words in served.store.commands.answer(key).said
    assert served.store.steering().changed == {"quorum": 5}


def test_rolling_back(served: Served) -> None:
    assert served.do(RollBack(2))[0] == "done"
    assert served.store.round() == RoundState(4, "open", 5, 1600.0)
    version = served.store.version(5)
    assert version is not None and version.parent == 2
    old = served.store.version(2)
    assert old is not None and version.bands == old.bands, "the same bytes again"
    assert served.store.history.left(3, 4) and not served.store.history.left(4, 5)
    for key, number, code in (("a", 5, "state"), ("b", 9, "unknown")):
        assert served.do(RollBack(number), key) == ("refused", code)
    assert "there are 1, 2, 3, 4, 5" in served.store.commands.answer("b").said
    served.store.set_round(RoundState(6, "open", 7, 1600.0))
    served.do(RollBack(3), "last")
    assert served.store.round() == RoundState(6, "finished", 8, None), "it was the last round"


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_version_that_is_damaged_is_not_gone_back_to(served: Served, damage: str) -> None:
    """It is said, and the job goes on: the daemon does not end with it."""
    for file in (served.folder / "versions/2").iterdir():
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:40])
    assert served.do(RollBack(2)) == ("refused", "failed")
    assert "can't go back to version 2" in served.store.commands.answer("k").said
    assert served.store.round() == OPEN
    assert served.do(RollBack(3), "other")[0] == "done"


def test_updates_of_what_was_left_do_not_count(tmp_path: Path) -> None:
    """Not even where late updates do: they carry on what the operator has turned away from."""
    a = Aggregator(tmp_path / "state", make_job(), Policy(late_updates=3))
    a.greet()
    from protocol.tensors import encode
    from tests.aggregator.uploading import update

    data = encode(update(a.job), "f32")
    manifest = a.manifest(data)
    versions = Versions(a.job, a.store)
    a.store.begin_anew(
        RoundState(2, "open", 2, None),
        versions.write(first_version(a.job), version=2, parent=1),
        ended=RoundState(1, "open", 1, None),
        note="rolled back to version 1",
    )
    (answer,) = a.offer(manifest)
    assert (answer.kind, "left for an older version" in answer.reason) == ("reject", True)


def test_devices_with_adapters_of_their_own_are_not_rolled_back(tmp_path: Path) -> None:
    served = Served(tmp_path / "state", make_job(rule="trust-weights"))
    assert served.do(RollBack(2)) == ("refused", "state")
    served.store.close()


def test_no_command(served: Served) -> None:
    with pytest.raises(ControlRefused, match="this is no command"):
        read_command('{"kind": "rm"}')
    assert served.do(Revoke("kitchen")) == ("refused", "wrong")


# -- once, or not at all -------------------------------------------------------------------------


def test_the_same_key_is_the_same_command(served: Served) -> None:
    served.do(PauseJob())
    served.put(ResumeJob())  # under the key of one that is answered
    served.operator.step()
    assert served.store.steering().paused == 1000.0


def test_what_nobody_waits_for_any_more_is_not_done(served: Served) -> None:
    served.put(PauseJob(), "old", expires=999.0)
    served.put(PauseJob(), "taken back")
    served.store.commands.withdraw("taken back")
    served.operator.step()
    assert served.store.steering().paused is None
    assert served.told("old") == ("refused", "late")
    assert served.told("taken back")[0] == "withdrawn"


KILLED = """
import os, signal, sys
from pathlib import Path
from aggregator.commands import CommandTable
from tests.aggregator.test_control import *

settle = CommandTable.settle
def killed(table, *arguments, **named):
    if sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    settle(table, *arguments, **named)
    if sys.argv[2] == "after":
        os.kill(os.getpid(), signal.SIGKILL)
CommandTable.settle = killed
job = make_job()
store = Store(Path(sys.argv[1]))
log = EventLog(as_json=True)
Operator(job, FILE, store, Versions(job, store), log, lambda: 1000.0).step()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["before", "after", "committed"])
def test_a_daemon_that_is_killed_over_a_command(served: Served, when: str) -> None:
    """Killed in the transaction it has done nothing and does it at the next start; or all of it."""
    served.put(ChangePolicy(quorum=7))
    run = [sys.executable, "-c", KILLED, str(served.folder), when]
    assert subprocess.run(run, check=False).returncode == -signal.SIGKILL
    done = when == "committed"
    assert (served.told()[0], served.store.steering().changed) == (
        ("done", {"quorum": 7}) if done else ("waiting", {})
    )
    served.operator.step()
    assert (served.told()[0], served.store.steering().changed) == ("done", {"quorum": 7})
    assert len(served.events()) == (0 if done else 1)


# -- asking --------------------------------------------------------------------------------------


def test_asking_and_being_answered(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    served = Served(folder)
    served.now = time.time()
    with pytest.raises(NoDaemon, match="no aggregator serves"):
        ask(folder, PauseJob(), by="test")
    stop = threading.Event()

    def daemon() -> None:
        other = Served.__new__(Served)
        other.store = Store(folder)
        log = EventLog(as_json=True, stream=io.StringIO())
        operator = Operator(
            served.job, FILE, other.store, Versions(served.job, other.store), log, time.time
        )
        while not stop.is_set():
            operator.step()
            time.sleep(0.01)
        other.store.close()

    with lock_folder(folder, "aggregator"):
        thread = threading.Thread(target=daemon)
        thread.start()
        try:
            assert "paused" in ask(folder, PauseJob(), by="test", key="mine").said
            assert "paused" in ask(folder, PauseJob(), by="test", key="mine").said, "not again"
            with pytest.raises(ControlRefused, match="is paused already") as refused:
                ask(folder, PauseJob(), by="test")
            assert refused.value.code == "state"
        finally:
            stop.set()
            thread.join()
        with pytest.raises(NoDaemon, match="did not get to it in time"):
            ask(folder, ResumeJob(), by="test", timeout_s=0.2)
        assert served.store.commands.waiting() == []
    served.store.close()


def test_commands_are_private(served: Served, tmp_path: Path) -> None:
    mode: Callable[[Path], int] = lambda path: path.stat().st_mode & 0o777  # noqa: E731
    assert mode(served.folder / "store.sqlite") == 0o600
