"""What a merge rule could not do as its job says is in the report of a replay."""

from __future__ import annotations

from device_profiles.history import History
from device_profiles.report import render_report
from device_profiles.summary import read_summary


def test_a_warning_stands_by_the_shares_of_its_round() -> None:
    history = History()
    for number in (1, 2):
        merge = {"round": number, "version": number + 1, "seconds": 0.1, "weights": {"pi": 1.0}}
        history.take({"event": "merged", **merge})
    history.take({"event": "warning", "round": 2, "reason": "<b> did not tell"})
    summary = {"devices": [{"name": "pi"}], "history": history.rounds()}
    assert "Warnings: round 2: &lt;b&gt; did not tell." in render_report(read_summary(summary))
