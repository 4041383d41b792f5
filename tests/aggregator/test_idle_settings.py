"""Settings that come to nothing are said: by `config check`, and where the job is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregator.cli import app
from aggregator.config import check_settings
from aggregator.daemon import Daemon
from aggregator.idle_settings import idle_settings
from aggregator.rounds import Policy
from aggregator.store import Store
from protocol.events import EventLog
from protocol.messages import Job
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress
from tests.aggregator.uploading import make_job

FEDAVG: dict[str, Any] = {"rule": "fedavg", "remainder": "frozen"}
SPLIT = "split does nothing without momentum or error_feedback"
BUFFERED = {"mode": "buffered", "buffer": 2, "keep_versions": 0}


def said(**fields: Any) -> list[str]:
    job = {"job": "notes", "model": "any", **fields}
    return [*idle_settings(*check_settings(job, "job.toml"))]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rule_settings": {"discrepancy_slope": 1}}, 'without weights = "discrepancy"'),
        ({"rule_settings": {"discrepancy_offset": 0}}, 'without weights = "discrepancy"'),
        (
            {"rule_settings": {"memory_rank": 2, "momentum": 0.0}},
            "without momentum or error_feedback",
        ),
        ({**FEDAVG, "rule_settings": {"split": "left"}}, SPLIT),
        ({**FEDAVG, "rule": "hetlora", "rule_settings": {"split": "balanced"}}, SPLIT),
        ({"training": {"optimizer": "adafactor", "clip_norm": 0.1}}, 'optimizer = "adafactor"'),
        ({"rule_settings": {"staleness": True}}, "without late updates (policy.late_updates"),
        ({"policy": {"late_updates": 1}}, "counts a late update as if it were of today"),
        (
            {**FEDAVG, "rule_settings": {"clip": 1.0}},
            "bounds nothing with rule = ",
        ),
        (
            {"pruning": {"enabled": False, "gamma": 0.5}},
            "pruning.gamma does nothing with pruning.enabled = false",
        ),
        ({"pruning": {"rank_min": 65}}, "pruning cuts nothing: pruning.rank_min = 65 is over"),
        (
            {"training": {"learning_rate_last": 0.1}, "rounds": 1},
            "training.learning_rate_last does nothing with rounds = 1",
        ),
        (
            {"rule": "trust-weights", "policy": {"late_updates": 1}},
            'rule = "trust-weights" counts a late update as if it were of today',
        ),
        ({"rule": "trust-weights", "rule_settings": {"candidates": 3}}, '"trust-validation"'),
        ({"probe": {"text": "one two three"}}, '[probe] does nothing without rule = "trust-pred'),
        ({"rule": "krum"}, "byzantine = 0.2 leaves nobody out of a round of fewer than 5 devices"),
        (
            {"rule": "krum", "rule_settings": {"byzantine": 3}, "policy": {"quorum": 8}},
            "fewer than 9 devices: raise policy.quorum to that; it is 8",
        ),
        (
            {"rule_settings": {"opposed": 0.1}, "policy": BUFFERED},
            "fewer than 10 devices: raise policy.buffer to that; it is 2",
        ),
        ({**FEDAVG, "layers": "fit"}, "down to nothing; rules that do not: anchored, segment, ge"),
    ],
)
def test_a_setting_that_does_nothing_is_said(fields: dict[str, Any], why: str) -> None:
    (line,) = said(**fields)
    assert why in line


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rule_settings": {"discrepancy_slope": 1, "weights": "discrepancy"}},
        {"rule_settings": {"memory_rank": 2}},
        {"rule": "flexlora", "rule_settings": {"memory_rank": 2, "momentum": 0.3}},
        {"rule_settings": {"memory_rank": 2, "error_feedback": True}},
        {"rule_settings": {"split": "left"}},
        {"pruning": {"enabled": False}, "training": {"learning_rate_last": 0.1}},
        {"pruning": {"rank_min": 64}},
        {"rule_settings": {"split": "left"}, "layers": "fit"},
        {**FEDAVG, "rule_settings": {"split": "left", "momentum": 0.3}},
        {**FEDAVG, "rule_settings": {"split": "left"}, "policy": BUFFERED},
        {
            **FEDAVG,
            "rule_settings": {"split": "left", "staleness": True},
            "policy": {"late_updates": 1},
        },
        {"rule": "krum", "rule_settings": {"opposed": 0.2}, "policy": {"quorum": 5}},
        {"rule": "trust-validation", "rule_settings": {"candidates": 3}},
        {"rule": "trust-weights", "layers": "fit", "rule_settings": {"split": "left"}},
    ],
)
def test_what_does_something_is_not(fields: dict[str, Any]) -> None:
    assert said(**fields) == []


def test_it_is_said_where_the_job_is_checked(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        'job = "notes"\nmodel = "base-tiny"\n[rule_settings]\nmemory_rank = 2\nmomentum = 0.0\n'
    )
    settings = tmp_path / "fleet.toml"
    settings.write_text('jobs = ["job.toml"]\n')
    ended = CliRunner().invoke(app, ["config", "check", "-c", str(settings)])
    assert ended.exit_code == 0
    assert "job.toml: rule_settings.memory_rank does nothing without momentum" in ended.stderr


def test_it_is_said_where_the_job_is_served(
    tmp_path: Path, mosquitto: BrokerAddress, capsys: pytest.CaptureFixture[str]
) -> None:
    job: Job = make_job(rule_settings={"memory_rank": 2, "momentum": 0.0})
    store, key = Store(tmp_path / "state"), SigningKey.load_or_create(tmp_path / "key")
    daemon = Daemon(job, Policy(), store, mosquitto, EventLog(as_json=True), key=key)
    daemon.start()
    daemon.close()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events].index("serving") == 0
    assert [e["reason"] for e in events if e["event"] == "idle-setting"] == [
        "rule_settings.memory_rank does nothing without momentum or error_feedback"
    ]
