"""Trackers are told of every round that has ended, in order, and once; none holds anything up."""

from __future__ import annotations

import importlib.util
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aggregator.errors import ConfigError
from aggregator.tracking import tracker as tracking
from aggregator.tracking.base import Run, Values, values_of
from aggregator.tracking.lines import FILE, mend
from aggregator.tracking.tracker import DONE, SINKS, Tracker, check_sinks, ended_after
from aggregator.view import StateView
from benchmarks.made_fleet import made_fleet
from protocol.events import EventLog

ROUNDS = 5


@pytest.fixture
def state(tmp_path: Path) -> Path:
    made_fleet(tmp_path / "notes", devices=4, rounds=ROUNDS)
    return tmp_path / "notes"


def lines(state: Path) -> list[dict[str, Any]]:
    file = state / "tracking" / "jsonl" / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def track(state: Path, *sinks: str, options: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Track what there is until every sink has been told; return the events."""
    told = io.StringIO()
    with Tracker(state, sinks, EventLog(as_json=True, stream=told), options, every_s=0.05):
        wanted = [state / "tracking" / name / DONE for name in check_sinks(sinks)]
        until(lambda: bool(told.getvalue()) or all(_number(file) == ROUNDS for file in wanted))
    return told.getvalue()


def _number(file: Path) -> int:
    return int(file.read_text()) if file.exists() else 0


def test_lines_are_always_written_and_have_the_views_figures(state: Path) -> None:
    assert track(state) == ""
    found = lines(state)
    assert [line["round"] for line in found] == [*range(1, ROUNDS + 1)]
    with StateView(state) as view:
        for line in found:
            one = view.round(line["round"])
            assert one is not None
            assert line == {"job": "notes", "round": one.number, **values_of(one)}
            assert line["loss/held_out"] == one.loss and line["merge/seconds"] == one.merge_s


def test_a_restart_goes_on_where_it_was(state: Path) -> None:
    """A crash may come between a line and the note that it is written: it is there once."""
    track(state)
    (state / "tracking" / "jsonl" / DONE).write_text("2")
    with (state / "tracking" / "jsonl" / FILE).open("ab") as file:
        file.write(b'{"job": "notes", "rou')
    track(state)
    assert [line["round"] for line in lines(state)] == [*range(1, ROUNDS + 1)]


def test_a_line_that_was_cut_short_is_taken_off(tmp_path: Path) -> None:
    file = tmp_path / FILE
    assert mend(file) == 0
    file.write_text('{"round": 3}\n{"ro')
    assert mend(file) == 3
    assert file.read_text() == '{"round": 3}\n'


def test_the_open_round_is_not_told(state: Path) -> None:
    with StateView(state) as view:
        assert [one.number for one in ended_after(view, 0)] == [*range(1, ROUNDS + 1)]
        assert [one.number for one in ended_after(view, 3)] == [4, 5]
        assert ended_after(view, ROUNDS) == []


def test_a_sink_that_fails_ends_alone(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, run: Run) -> None:
            self.closed = False

        def log(self, step: int, values: Values) -> None:
            raise RuntimeError("the tracker\nis away")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tracking, "SINKS", {**SINKS, "tensorboard": Broken})
    told = io.StringIO()
    with Tracker(state, ["tensorboard"], EventLog(as_json=True, stream=told), every_s=0.05):
        until(lambda: len(lines(state)) == ROUNDS and bool(told.getvalue()))
    event = json.loads(told.getvalue())
    assert (event["event"], event["sink"]) == ("tracking-failed", "tensorboard")
    assert event["reason"] == "RuntimeError: the tracker is away"


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no tracking sink 'neptune'"):
        check_sinks(["neptune"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"pip install '.\[{name}\]'"):
            check_sinks([name])
    assert check_sinks([]) == ("jsonl",)


def test_tensorboard_reads_what_is_written(state: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    assert track(state, "tensorboard") == ""
    (file,) = (state / "tracking" / "tensorboard").glob("events.*")
    losses = {
        event.step: value.simple_value
        for event in map(Event.FromString, _records(file.read_bytes()))
        for value in event.summary.value
        if value.tag.startswith("loss")
    }
    assert losses == {
        line["round"]: pytest.approx(line["loss/held_out"], rel=1e-6) for line in lines(state)
    }


def _records(data: bytes) -> list[bytes]:
    """Return the records of an event file: length and its checksum, bytes and theirs."""
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
    return found


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("default")
def test_mlflow_has_every_round(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    assert track(state, "mlflow") == ""
    folder = state / "tracking" / "mlflow"
    client = MlflowClient(tracking_uri=folder.as_uri())
    run = client.get_run((folder / "run-id").read_text())
    history = client.get_metric_history(run.info.run_id, "loss/held_out")
    assert {one.step: one.value for one in history} == {
        line["round"]: line["loss/held_out"] for line in lines(state)
    }
    assert run.data.params["rule"] == "anchored"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("default")
def test_wandb_writes_a_run_offline(state: Path) -> None:
    assert track(state, "wandb") == ""
    (file,) = (state / "tracking" / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000
