"""The terminal shows the fleet while it runs, and its figures when it ends."""

from __future__ import annotations

import math
import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from device_profiles.summary import Summary
from device_profiles.tables import LiveFleet, loss_table, plain_line

SUMMARY: dict[str, Any] = {
    "loss": {"base": 3.2, "local": 2.5, "merged": 2.4},
    "devices": [
        {
            "name": "[red]pi4[/red]",
            "profile": "raspberry-pi-4b-4gb",
            "predicted_mib": 300,
            "peak_mib": 411.6,
            "rank_start": 16,
            "rank_end": 11,
            "loss": {"base": 3.0, "local": 2.6, "merged": 2.2},
            "bytes_up": 4_204_000,
            "bytes_down": 512,
        },
        {
            "name": "laptop",
            "rank_start": 64,
            "rank_end": 64,
            "loss": {"base": 3.4, "local": 2.1, "merged": math.nan},
            "bytes_up": 1_000_000,
        },
    ],
}


def shown(renderable: RenderableType, width: int = 140, styles: bool = False) -> str:
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=styles,
        color_system="standard" if styles else None,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def words(text: str, word: str) -> str:
    """Return the line that holds `word`, its columns one space apart."""
    return " ".join(line_with(text, word).split())


def test_the_table_ends_with_losses_across_the_fleet_where_they_were_measured() -> None:
    across = {"base": 2.9, "local": 2.8, "merged": 2.6}
    told = words(shown(loss_table({**SUMMARY, "across": across})), "on all text")
    assert told.endswith("2.900 2.800 2.600")
    assert "on all text" not in shown(loss_table(SUMMARY))


def test_the_table_holds_a_row_a_device_and_the_mean() -> None:
    text = shown(loss_table(SUMMARY))
    pi4 = words(text, "pi4")
    assert pi4.startswith("[red]pi4[/red] raspberry-pi-4b-4gb 16 → 11 300 / 412 4.20 MB 512 B")
    assert pi4.endswith("3.000 2.600 2.200")
    laptop = line_with(text, "laptop").split()
    assert laptop[-1] == "\N{EN DASH}"
    assert laptop[1:5] == ["64", "\N{EN DASH}", "/", "\N{EN DASH}"]
    assert words(text, "mean").endswith("5.20 MB 512 B 3.200 2.500 2.400")


def test_the_table_says_what_each_device_trained_with_where_not_all_had_torch() -> None:
    pi4, laptop = SUMMARY["devices"]
    mixed = {**SUMMARY, "devices": [{**pi4, "backend": "onnx"}, {**laptop, "backend": "torch"}]}
    text = shown(loss_table(mixed))
    assert words(text, "pi4").startswith("[red]pi4[/red] onnx 16 → 11")
    assert words(text, "laptop").startswith("laptop torch 64")
    assert words(text, "mean").endswith("5.20 MB 512 B 3.200 2.500 2.400")
    assert "raspberry" not in text, "no room for it where 80 characters are all"
    alike = {**SUMMARY, "devices": [{**pi4, "backend": "torch"}]}
    assert "torch" not in shown(loss_table(alike))
    told = plain_line({"event": "mixed", "onnx": ["pi4"]})
    assert told == "ONNX Runtime trains pi4"


def test_the_best_loss_is_bold_in_each_row() -> None:
    text = shown(loss_table(SUMMARY), styles=True)
    assert re.search(r"\x1b\[1m *2\.200\x1b", text)
    assert re.search(r"\x1b\[1m *2\.100\x1b", text)
    assert not re.search(r"\x1b\[1m *2\.600", text)


def test_a_peak_far_from_its_prediction_stands_out() -> None:
    assert "\x1b[33m412\x1b" in shown(loss_table(SUMMARY), styles=True)


def test_a_mean_that_is_missing_is_taken_from_the_devices() -> None:
    text = shown(loss_table(Summary.model_validate(SUMMARY | {"loss": {}})))
    assert words(text, "mean").endswith("3.200 2.350 2.200")


def test_an_empty_fleet_has_a_table() -> None:
    assert "mean" in shown(loss_table({}))


EVENTS: list[dict[str, Any]] = [
    {"event": "plan", "device": "pi4", "rank": 16, "profile": "raspberry-pi-4b-4gb"},
    {"event": "state", "device": "pi4", "state": "training"},
    {"event": "round", "device": "pi4", "round": 2, "rounds": 4},
    {"event": "step", "device": "pi4", "round": 2, "step": 3, "steps": 10, "loss": 2.71828},
    {"event": "bytes", "device": "pi4", "up": 1_500_000, "down": 250},
    {"event": "pruned", "device": "pi4", "rank_before": 16, "rank_after": 11},
    {"event": "merged", "round": 1, "seconds": 0.184, "devices": 6},
]


def fed(*events: dict[str, Any]) -> LiveFleet:
    fleet = LiveFleet()
    for event in events:
        fleet.update(event)
    return fleet


def test_the_live_view_shows_what_the_events_said() -> None:
    text = shown(fed(*EVENTS))
    row = re.sub("[━╸╺ ]+", " ", line_with(text, "pi4")).strip()
    assert row == "pi4 raspberry-pi-4b-4gb 11 2 3/10 2.718 1.50 MB 250 B training"
    progress = line_with(text, "round 2 of 4")
    assert "merged 6 devices in 0.18 s" in progress


ALONE = {"event": "alone", "device": "pi4", "step": 9, "steps": 36, "loss": 2.25}
MEASURING = {"event": "measuring", "adapters": 7, "texts": 6}


def test_training_alone_has_its_own_progress() -> None:
    other = {**EVENTS[2], "device": "laptop"}
    text = shown(fed(*EVENTS, other, ALONE))
    assert "9/36 2.250" in words(text, "pi4")
    assert "training alone, to compare" in text
    assert "round 2 of 4" not in text
    quarter, whole = (
        line_with(shown(fed(*EVENTS, other, alone), styles=True), "to compare")
        for alone in (ALONE, ALONE | {"step": 36})
    )
    assert quarter != whole


def test_measuring_at_the_end_is_shown() -> None:
    text = shown(fed(*EVENTS, ALONE, MEASURING))
    assert "measuring 7 adapters on 6 texts" in text
    assert "to compare" not in text


def test_an_evaluation_replaces_the_training_loss() -> None:
    text = shown(fed(*EVENTS, {"event": "evaluated", "device": "pi4", "loss": 2.5}))
    assert "2.500" in line_with(text, "pi4")
    assert "2.718" not in text


@pytest.mark.parametrize(
    "event",
    [
        {"event": "unheard-of", "device": "new"},
        {"event": "step"},
        {"device": "new"},
        {},
        {"event": "merged"},
    ],
)
def test_an_unknown_event_adds_no_row(event: dict[str, Any]) -> None:
    before, after = shown(fed(*EVENTS)), shown(fed(*EVENTS, event))
    assert line_with(after, "pi4") == line_with(before, "pi4")
    assert len(after.splitlines()) == len(before.splitlines())


@pytest.mark.parametrize("kind", ["plan", "state", "round", "step", "bytes", "pruned", "evaluated"])
def test_an_event_without_its_fields_is_shown_with_gaps(kind: str) -> None:
    assert "new" in shown(fed({"event": kind, "device": "new"}))
    plain_line({"event": kind, "device": "new"})


def test_the_view_can_be_drawn_before_any_event_and_on_a_narrow_terminal() -> None:
    assert "round 0 of" in shown(LiveFleet())
    assert "round 0 of 12" in shown(LiveFleet(rounds=12))
    assert "pi4" in shown(fed(*EVENTS), width=60)


REJECTED = {
    "event": "rejected",
    "process": "aggregator",
    "device": "pi4",
    "round": 2,
    "reason": "too large",
}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (EVENTS[0], "pi4: rank 16, profile raspberry-pi-4b-4gb"),
        (EVENTS[1], None),
        (EVENTS[2], None),
        (EVENTS[3], None),
        (EVENTS[3] | {"step": 10}, "pi4: round 2 trained, 10 steps, training loss 2.718"),
        (EVENTS[4], None),
        (EVENTS[5], "pi4: rank cut 16 → 11"),
        (EVENTS[6], "round 1: merged 6 devices in 0.18 s"),
        (EVENTS[6] | {"devices": 1}, "round 1: merged 1 device in 0.18 s"),
        ({"event": "warning", "round": 2, "reason": "f is 0"}, "round 2: f is 0"),
        ({"event": "idle-setting", "reason": "x does nothing"}, "note: x does nothing"),
        ({"event": "held", "round": 2, "reason": "a rule failed"}, "round 2: a rule failed"),
        (REJECTED, "round 2: the update of pi4 was refused: too large"),
        (REJECTED | {"process": "pi4"}, None),
        (
            {"event": "refused", "process": "pi4", "reason": "no JSON"},
            "pi4: a message was refused: no JSON",
        ),
        (
            {"event": "quarantined", "device": "pi4", "until": 1.0},
            "pi4: nothing more is taken from it for a while, too much was refused",
        ),
        (
            {"event": "serving", "rounds": 6},
            "6 rounds; devices plan: the first time they measure, for a minute or so",
        ),
        (ALONE, "pi4: training alone, to compare, step 9 of 36, loss 2.250"),
        (ALONE | {"step": 1}, "pi4: training alone, to compare, step 1 of 36, loss 2.250"),
        (ALONE | {"step": 36}, "pi4: training alone, to compare, step 36 of 36, loss 2.250"),
        (ALONE | {"step": 10}, None),
        ({"event": "alone", "device": "pi4"}, None),
        (MEASURING, "measuring 7 adapters on 6 texts"),
        ({"event": "evaluated", "device": "pi4", "loss": 2.5}, "pi4: held-out loss 2.500"),
        ({"event": "unheard-of"}, None),
        ({"event": "step", "device": "pi4"}, None),
        ({}, None),
    ],
)
def test_only_events_worth_a_line_get_one(event: dict[str, Any], line: str | None) -> None:
    assert plain_line(event) == line


def test_adapters_of_their_own_have_a_column_that_a_narrow_terminal_shows_too() -> None:
    devices = [dict(device) for device in SUMMARY["devices"]]
    devices[0] |= {"name": "pi4", "loss": devices[0]["loss"] | {"personal": 2.125}}
    means = SUMMARY["loss"] | {"personal": 2.25}
    across = {"base": 2.9, "local": 2.8, "merged": 2.6, "personal": 2.7}
    summary = {**SUMMARY, "devices": devices, "loss": means, "across": across}
    text = shown(loss_table(summary), width=80)
    assert words(text, "base").endswith("base local merged own")
    assert words(text, "pi4").endswith("3.000 2.600 2.200 2.125")
    assert words(text, "laptop").endswith("3.400 2.100 \N{EN DASH} \N{EN DASH}")
    assert words(text, "mean").endswith("3.200 2.500 2.400 2.250")
    assert words(text, "on all text").endswith("2.900 2.800 2.600 2.700")
    assert words(shown(loss_table(SUMMARY)), "base").endswith("base local merged")


def test_lines_say_which_adapter_was_measured_and_which_was_not_tried() -> None:
    own = {"event": "evaluated", "device": "pi4", "loss": 2.5, "adapter": "its own adapter"}
    assert plain_line(own) == "pi4: held-out loss 2.500 with its own adapter"
    left_out = {"event": "not-tried", "device": "pi4", "adapter": "the trial", "reason": "late"}
    assert plain_line(left_out) == "pi4: did not try the trial: late"
