"""What the daemon tells: to people on a terminal, to the journal, to whoever reads JSON Lines."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from aggregator.logs import StructuredLog, chosen_format
from protocol.events import EventLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_are_as_they_were_with_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 12.3456)
    streams = io.StringIO(), io.StringIO()
    logs = EventLog(as_json=True, stream=streams[0]), StructuredLog("json", stream=streams[1])
    for log in logs:
        log.emit("merged", round=3, weights={"a": 0.5}, version=None, reason="é\x1b[2J")
    before, now = (json.loads(stream.getvalue()) for stream in streams)
    assert now == {**before, "level": "info"}
    assert list(now)[:2] == ["event", "time"]


def test_plain_lines_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 12.3456)
    streams = io.StringIO(), io.StringIO()
    for log in (
        EventLog(as_json=False, stream=streams[0]),
        StructuredLog("plain", stream=streams[1]),
    ):
        log.emit("round", round=3, fraction=0.123456, state="open")
    assert streams[0].getvalue() == streams[1].getvalue() != ""


def test_what_a_device_says_does_nothing_to_a_terminal() -> None:
    stream = Terminal()
    StructuredLog("console", stream=stream).emit("device", detail="\x1b[2Jgone\n", long="x" * 5000)
    said = stream.getvalue()
    assert "\x1b[2J" not in said and said.count("\n") == 1 and "x" * 501 not in said
    assert "device" in said and "gone" in said


def test_from_a_level_on_and_part_by_part() -> None:
    stream = io.StringIO()
    log = StructuredLog("json", level="warning", stream=stream)
    part = log.part(job="notes")

    def heard() -> list[tuple[str, str | None]]:
        lines = map(json.loads, stream.getvalue().splitlines())
        return [(line["event"], line.get("job")) for line in lines]

    part.emit("merged")
    part.emit("rejected", reason="x")
    assert heard() == [("rejected", "notes")]
    log.level = "info"
    part.emit("merged")
    log.emit("reloaded")
    assert heard()[1:] == [("merged", "notes"), ("reloaded", None)]


def test_nothing_is_told_of_what_was_not_committed() -> None:
    stream = io.StringIO()
    log = StructuredLog("json", stream=stream)

    def fail() -> None:
        with log.held():
            log.emit("counted")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stream.getvalue() == ""
    with log.held():
        log.emit("counted")
        assert stream.getvalue() == ""
    assert "counted" in stream.getvalue()


def test_who_listens_decides(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as stream:
        status = os.fstat(stream.fileno())
        journal = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert chosen_format("auto", stream, {}) == "plain"
        assert chosen_format("auto", stream, journal) == "json"
        inherited = {"JOURNAL_STREAM": "1:2", "INVOCATION_ID": "a"}
        assert chosen_format("auto", stream, inherited) == "plain", "a terminal's own"
        service = {"INVOCATION_ID": "a", "NOTIFY_SOCKET": "/run/systemd/notify"}
        assert chosen_format("auto", stream, service) == "json"
        assert chosen_format("plain", stream, journal) == "plain"
        assert chosen_format("auto", Terminal(), journal) == "console"
