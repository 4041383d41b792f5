"""`edge-client status`: what an agent writes down, damaged files too, and why it has ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_client import cli
from edge_client.condition import UNTOLD, in_words, read_condition
from edge_client.errors import ConfigError, StorageError
from edge_client.outbox import Outbox
from edge_client.report import FILE, Report, agent_runs
from edge_client.taking_part import telling_failure
from protocol.broker import free_port
from protocol.cli import Interrupted
from protocol.events import EventLog

PLAN = {
    "event": "plan",
    "plan": "rank 8 of 8 held",
    "rank": 8,
    "predicted_mib": 106.0,
    "floor_mib": 417.0,
}


def told(state: Path, *events: dict[str, Any]) -> str:
    """Return what `status` says after events of an agent that is this process."""
    report = Report(state, "kitchen")
    for event in events:
        report.take(event)
    return "\n".join(in_words(read_condition(state, datetime.now())))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    Outbox(tmp_path).close()
    return tmp_path


def test_memory_is_that_of_the_whole_process(state: Path) -> None:
    said = told(state, PLAN)
    assert "523 MiB predicted for the whole training process (417 of them before" in said
    stepped = {"event": "stepped-down", "plan": "rank 4", "predicted_mib": 50.0, "why": "signal 9"}
    said = told(state, PLAN, stepped)
    assert "467 MiB" in said and "plan      rank 4" in said and "signal 9" in said
    unsaid = {key: value for key, value in PLAN.items() if key != "floor_mib"}
    assert "106 MiB predicted beside what the libraries take" in told(state, unsaid)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "is damaged"),
        ('{"device": "kit', "is damaged"),
        ("\xff", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is not an agent's"),
        ('{"job": "notes", "round": null, "step": 3, "pruned": []}', "job, round, step, pruned"),
        ('{"plan": {"plan": "x", "rank": 2, "predicted_mib": "a"}, "state": 3}', "plan, state"),
        ('{"step": {"step": true}, "evaluated": {"loss": null}}', "step, evaluated"),
        ('{"ended": {"why": "x", "time": "y"}, "detail": {}}', "ended, detail"),
        ('{"step": {}, "plan": {}, "round": {}, "job": {}, "ended": {}, "later": [1]}', ""),
        ('{"time": 1e300, "state": "idle", "pid": -1, "began": "x"}', ""),
        ('{"time": 1, "state": "idle", "pid": 1e400, "began": 1}', ""),
    ],
)
def test_a_damaged_file_is_said_and_the_rest_is_shown(
    state: Path, written: str, problem: str
) -> None:
    (state / FILE).write_bytes(written.encode("latin-1"))
    condition = read_condition(state, datetime.now())
    lines = in_words(condition)
    assert "not running" in lines[0]
    assert any(line.startswith("updates") for line in lines)
    notes = [line for line in lines if line.startswith("note")]
    assert len(notes) == bool(problem) and problem in "".join(notes)
    json.dumps(condition.as_dict())


def test_what_is_no_state_folder_is_said_in_one_line(state: Path) -> None:
    (state / FILE).mkdir()
    with pytest.raises(StorageError, match="is a directory"):
        read_condition(state, datetime.now())
    for folder, said in ((state / "none", "there is no folder"), (state / "outbox.sqlite", "file")):
        with pytest.raises(StorageError, match=said):
            read_condition(folder, datetime.now())
    (state / "empty").mkdir()
    with pytest.raises(StorageError, match="no agent has run"):
        read_condition(state / "empty", datetime.now())


def test_an_outbox_that_is_gone_or_empty(state: Path) -> None:
    (state / "outbox.sqlite").unlink()
    assert "updates that waited there are lost" in told(state, PLAN)
    (state / "outbox.sqlite").touch()
    assert "0 counted, 0 on their way" in told(state, PLAN)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time of day is all there is")
def test_an_agent_lives_on_when_the_clock_is_set(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(state, {"event": "state", "state": "training"})
    when = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: when + 3600.0)
    assert read_condition(state, datetime.now()).running and agent_runs(state)
    fields = json.loads((state / FILE).read_text())
    boot, _, ticks = fields["began"].partition("/")
    for other in (f"{boot}/{int(ticks) + 1}", f"{boot[::-1]}/{ticks}"):
        (state / FILE).write_text(json.dumps({**fields, "began": other}))
        assert not agent_runs(state), "another process by its number, or before the last start"


def test_why_the_last_agent_has_ended_is_kept(state: Path) -> None:
    told(state, {"event": "state", "state": "training"})
    fields = json.loads((state / FILE).read_text())
    (state / FILE).write_text(json.dumps({**fields, "began": 1.0}))  # its process is gone
    assert UNTOLD in "\n".join(in_words(read_condition(state, datetime.now())))
    report = Report(state, "kitchen")
    events = EventLog(as_json=True, also=report.take)
    for error, why in (
        (ConfigError("no such job"), "no such job"),
        (Interrupted(signal.SIGTERM), "told to stop by SIGTERM"),
        (ZeroDivisionError("x"), "a fault of this program (ZeroDivisionError: x)"),
    ):
        with pytest.raises(type(error)), telling_failure(events):
            raise error
        fields = json.loads((state / FILE).read_text())
        (state / FILE).write_text(json.dumps({**fields, "began": 1.0}))
        condition = read_condition(state, datetime.now())
        assert condition.ended == why == condition.as_dict()["ended"]
        assert f": {why}" in in_words(condition)[1]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "--no-wait"])
def test_an_agent_that_has_ended_says_why(tmp_path: Path, how: str) -> None:
    (tmp_path / "a.txt").write_text("what I have written")
    state = tmp_path / "state"
    command = [
        sys.executable, "-m", "edge_client", "run", "--data", str(tmp_path / "a.txt"), "--state",
        str(state), "--broker", f"mqtt://127.0.0.1:{free_port()}", "--json",
        *([how] if how == "--no-wait" else []),
    ]  # fmt: skip
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if how != "--no-wait":
        assert agent.stdout is not None
        while '"waiting"' not in agent.stdout.readline():
            assert agent.poll() is None
        agent.send_signal(getattr(signal, how))
    said, _ = agent.communicate(timeout=60)
    condition = read_condition(state, datetime.now())
    why = {"SIGTERM": "told to stop by SIGTERM", "SIGKILL": UNTOLD}.get(how, "no MQTT broker at")
    assert condition.ended.startswith(why)
    assert ('"ended"' in said) == (how != "SIGKILL")
    assert not condition.running


@pytest.mark.parametrize("name", ["X Y", "../../etc"])
def test_a_name_that_is_none_is_refused_as_run_does(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be a device's name"):
        cli.status(name=name)
