"""Settings of the daemon: which are in force and whence, and what is wrong with a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregator import settings
from aggregator.cli import app
from aggregator.errors import ConfigError
from aggregator.job_files import JobFile, open_job_file, reread
from aggregator.serving import root_of_states
from aggregator.tracking import tracker
from protocol.errors import TunefleetError
from protocol.settings_file import line_of
from tests.aggregator.uploading import make_job

GOOD = """
jobs = ["notes.json"]
broker = "mqtt://broker.example"
port = 1884

[log]
level = "warning"
"""


def written(folder: Path, text: str, name: str = "fleet.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    environ = {"TUNEFLEET_PORT": "1885", "TUNEFLEET_LOG__LEVEL": "error", "TUNEFLEET_FAULT": "x"}
    known = settings.read(file, {"log": {"format": "json"}, "state": None}, environ)
    assert known.settings.port == 1885
    assert (known.settings.log.level, known.settings.log.format) == ("error", "json")
    assert known.settings.jobs == [tmp_path / "notes.json"], "from the file's folder"
    found = {name: known.source(name) for name in settings.flat_values(known.settings)}
    assert {n: s for n, s in found.items() if not n.startswith(("page.", "tracking."))} == {
        "dir": "default",
        "jobs": f"{file}, line 2",
        "state": "default",
        "broker": f"{file}, line 3",
        "port": "TUNEFLEET_PORT",
        "key": "default",
        "enroll_port": "default",
        "onnx": "default",
        "engine": "default",
        "shared_intake": "default",
        "exit_when_done": "default",
        "wait_for_broker": "default",
        "log.level": "TUNEFLEET_LOG__LEVEL",
        "log.format": "--log-format",
    }
    flagged = settings.read(file, {"port": 7}, environ)
    assert (flagged.settings.port, flagged.source("port")) == (7, "--port")
    assert root_of_states(known.settings, known.folder) == tmp_path / "aggregator-state"


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("port = 99999", {}, ["line 1", "port", "at most 65535", "99999"]),
        ("\nbroker = 5", {}, ["line 2", "broker", "must be text", "5"]),
        ("broker = 'http://b'", {}, ["line 1", "broker", "mqtt://", "http://b"]),
        ("jobs = 'a.toml'", {}, ["line 1", "jobs", "must be a list", "a.toml"]),
        ("brokr = 'b'", {}, ["line 1", "'brokr'", "did you mean 'broker'"]),
        ("[log]\nlevel = 'loud'", {}, ["line 2", "log.level", "'debug', 'info'", "loud"]),
        ("[log]\n\nlvl = 'info'", {}, ["line 3", "'log.lvl'", "'log.level'"]),
        ("log = 3", {}, ["line 1", "log", "must be a table", "3"]),
        ("jobs = [", {}, ["line 1", "is not TOML", "jobs = ["]),
        ("port = 1\nport = 2", {}, ["line 2", "port = 2", "sets what is set already"]),
        (
            "exit_when_done = 'perhaps'",
            {},
            ["line 1", "exit_when_done", "true or false", "perhaps"],
        ),
        ("", {"TUNEFLEET_PORT": "x"}, ["TUNEFLEET_PORT", "port", "whole number", '"x"']),
        ("", {"TUNEFLEET_LOG__FORMAT": "xml"}, ["TUNEFLEET_LOG__FORMAT", "'json'", "xml"]),
        ("", {"TUNEFLEET_JOBS": "a.toml"}, ["TUNEFLEET_JOBS", "as JSON has it", '["a.toml"]']),
        ("", {"TUNEFLEET_TRACKING__SINKS": "x"}, ["TUNEFLEET_TRACKING__SINKS", '["x"]']),
        ("[page]\nport = 1", {"TUNEFLEET_PAGE": "8885"}, ["TUNEFLEET_PAGE", "must be a table"]),
        ("", {"TUNEFLEET_PAGE": "{"}, ["the environment", "page", "as JSON has it"]),
        ("", {"TUNEFLEET_PORT__X": "1"}, ["TUNEFLEET_PORT__X", "'port' is no table", "page"]),
        ("", {"TUNEFLEET_LOG__LVL": "info"}, ["TUNEFLEET_LOG__LVL", "'log.lvl'", "'log.level'"]),
        ("", {"TUNEFLEET_LOGS__LEVEL": "info"}, ["TUNEFLEET_LOGS__LEVEL", "'log'"]),
        ("enroll_port = 8884", {}, ["line 1", "enrolment needs the fleet's folder"]),
        ("dir = 'f'\nkey = 'k'", {}, ["line 2", "a fleet has a key of its own"]),
        ("engine = 'spark'", {}, ["line 1", "engine", "'plain' or 'ray'", "spark"]),
        ("port = 1\nshared_intake = true", {}, ["line 2", "named with --broker"]),
        (
            "dir = 'f'\nbroker = 'mqtt://b'\nshared_intake = true",
            {},
            ["line 3", "one certificate allows one connection"],
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_place_and_what_is_allowed(
    tmp_path: Path, text: str, environ: dict[str, str], said: list[str]
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        settings.read(file, {}, environ)
    message = str(error.value)
    assert (str(file) in message) == (not environ), message
    assert "\n" not in message and [word for word in said if word not in message] == [], message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the settings .*: there is no such file"):
        settings.read(tmp_path / "none.toml", {}, {})


@pytest.mark.parametrize(
    ("setting", "line"),
    [("a", 1), ("t.b", 5), ("t.u.c", 7), ("t", 4), ("u.x", 8), ("q.r", 3), ("none", None)],
)
def test_the_line_of_a_setting(setting: str, line: int | None) -> None:
    text = 'a = 1\n# a = 2\n"q".r = 3\n[t] # a table\nb = 2\n[t.u]\nc = 3\n[[u]]\n'
    assert line_of(text, setting.split(".")) == line


# -- the commands --------------------------------------------------------------------------------


def aggregator(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aggregator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_checking_and_showing(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    job = {**make_job().model_dump(), "policy": {"quorum": 2}}
    written(tmp_path, json.dumps(job), "notes.json")
    checked = aggregator("config", "check", "-c", file, cwd=tmp_path)
    assert checked.returncode == 0 and "job 'notes' is in order" in checked.stdout, checked.stderr
    shown = aggregator("config", "show", "-c", file, "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["port"] == {"value": 1884, "from": f"{file}, line 4"}
    plain = aggregator("config", "show", "-c", file, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[:2] for line in plain][:2] == [["setting", "value"], ["dir", "none"]]
    written(tmp_path, json.dumps({**job, "policy": {"quorum": 0}}), "notes.json")
    wrong = aggregator("config", "check", "-c", file, cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr == (
        f"error: {tmp_path / 'notes.json'}: policy.quorum: must be at least 1, not 0\n"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[page]\nport = 0\nhost = '0.0.0.0'", "open to the network"),
        ("[page]\nport = 0\ntoken_file = 'none'", "can't read the page's token"),
        ("[page]\nport = 0\ncertificate = 'ca.pem'", "go together"),
        ("[tracking]\nsinks = ['wandb']", "needs an extra"),
        ("dir = 'none'", "none"),
    ],
)
def test_what_serving_would_refuse_is_found_by_checking(
    tmp_path: Path, settings: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracker.PACKAGES, "wandb", "no_such_package")
    file = written(tmp_path, settings)
    ended = CliRunner().invoke(app, ["config", "check", "-c", str(file)])
    assert isinstance(ended.exception, TunefleetError) and said in str(ended.exception)
    assert "in order" not in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve"], "name one job file"),
        (["serve", "job.toml", "-c", "fleet.toml"], "name one job file"),
        (["serve", "-c", "none.toml"], "there is no such file"),
        (["status"], "there is no job's state in aggregator-state"),
        (["devices", "--state", "none"], "there is no job's state in none"),
        (["devices", "--only", "trainig"], "devices are online, training,"),
        (["devices", "--sort", "size"], "devices are sorted by name, state"),
        (["rounds", "--dir", "none"], "there is no job's state in none/state"),
        (["device", "show", "kitchen"], "there is no job's state"),
        (["job", "pause", "notes"], "there is no job's state"),
        (["job", "create", "none.toml"], "there is no such file"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(
    tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, arguments)
    assert isinstance(ended.exception, TunefleetError) and ended.stdout == ""
    assert said in str(ended.exception) and "\n" not in str(ended.exception)
    assert list(tmp_path.iterdir()) == [], "nothing was made by looking"


# -- a job file that is read again ---------------------------------------------------------------


def test_what_of_a_job_may_change_while_it_is_served(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    fields: dict[str, Any] = {**make_job().model_dump(), "policy": {"quorum": 2}}

    def write(**more: Any) -> None:
        path.write_text(json.dumps({**fields, **more}))

    write()
    _, known = open_job_file(path)
    assert (reread(known).changed, reread(known).refused) == ({}, ())
    write(policy={"quorum": 3, "deadline_s": 60}, rounds=9, seed=4)
    again = reread(known)
    assert again.changed == {"quorum": 3, "deadline_s": 60.0}
    assert again.refused == ("rounds", "seed")
    assert isinstance(again.file, JobFile) and again.file.policy.quorum == 3
    assert reread(again.file).changed == {}
    assert reread(again.file).refused == ("rounds", "seed"), "told each time"
    write(policy={"quorum": 0})
    with pytest.raises(ConfigError, match=r"policy.quorum: must be at least 1, not 0"):
        reread(known)
    write(job="letters")
    with pytest.raises(ConfigError, match="it was 'notes' and is 'letters' now"):
        reread(known)
