"""The report of a replay whose devices end with adapters of their own."""

from __future__ import annotations

import json
import random
from typing import Any

import plotly.graph_objects as go
import pytest

from device_profiles.report import headline
from device_profiles.summary import Summary
from tests.device_profiles.test_report import demo_summary, in_light, page_of

OWN = 0.25
"""By how much a device's own adapter is below its common loss, in nats a token."""


def personal_summary(*, without: int = 0) -> dict[str, Any]:
    """Return a demo's summary with own adapters for all but the first `without` devices."""
    summary = demo_summary()
    for device in summary["devices"][without:]:
        device["loss"]["personal"] = device["loss"]["merged"] - OWN
    ends = [d["loss"].get("personal", d["loss"]["merged"]) for d in summary["devices"]]
    summary["loss"]["personal"] = sum(ends) / len(ends)
    return summary


def test_what_devices_end_with_is_their_own_where_they_have_one() -> None:
    fleet = Summary.model_validate(personal_summary(without=1))
    first, second = fleet.devices[:2]
    assert (first.loss.together, second.loss.together) == (first.loss.merged, second.loss.personal)
    assert second.loss.merged is not None and second.loss.personal is not None
    assert second.loss.personal == second.loss.merged - OWN
    assert fleet.is_personal and not Summary.model_validate(demo_summary()).is_personal


def test_the_page_compares_their_own_with_the_common_one_and_with_training_alone() -> None:
    summary = personal_summary()
    fleet = Summary.model_validate(summary)
    text = "".join(page_of(summary).text)
    assert f"personal {fleet.mean_loss.personal:.2f} nats/token" in headline(fleet)
    assert f"the common one ({fleet.mean_loss.merged:.2f})" in text
    assert f"common {fleet.mean_loss.merged:.2f}" in text, "in the tile"
    for device in fleet.devices:
        assert f"{device.loss.personal:.3f}" in text
    assert "Its own" in text and "Its own" not in "".join(page_of(demo_summary()).text)


def test_the_line_of_a_device_ends_at_its_own_adapter_and_its_row_has_both() -> None:
    summary = personal_summary(without=1)
    figures = page_of(summary).figures()
    for index, device in enumerate(summary["devices"]):
        loss = device["loss"]
        line = next(t for t in figures["loss-rounds"]["data"] if t["meta"]["device"] == index)
        assert line["y"][-1] == loss.get("personal", loss["merged_on_device"])
        row = [t for t in figures["loss-devices"]["data"] if t["meta"]["device"] == index]
        dots = [t["x"][0] for t in row if t["mode"] == "markers"]
        assert dots[-1] == loss.get("personal", loss["merged"]), "the filled one, on top"
        assert loss["merged"] in dots


def with_trust(summary: dict[str, Any], *rounds: int, away: int = 0) -> dict[str, Any]:
    """Return a summary whose rounds have a trust matrix, without the first `away` devices."""
    devices = [device["name"] for device in summary["devices"]][away:]
    draw = random.Random(1)
    for entry in summary["history"]:
        if entry["round"] in rounds:
            rows = [[draw.random() + 3 * (i == j) for j in devices] for i in devices]
            weights = [[x / sum(row) for x in row] for row in rows]
            entry["trust"] = {"devices": devices, "weights": weights}
            entry["trust"]["temperatures"] = dict.fromkeys(devices[1:], 0.05)
    return summary


@pytest.mark.parametrize("devices", [1, 6, 8, 9, 40])
def test_who_trusts_whom_is_shown_where_there_is_such_a_thing(devices: int) -> None:
    figures = page_of(with_trust(demo_summary(devices), 2, 3, 12)).figures()
    assert list(figures)[-1] == "trust"
    drawn = in_light(figures["trust"])
    assert "$" not in json.dumps(drawn)
    go.Figure(drawn)
    (trace,) = drawn["data"]
    assert len(trace["z"]) == len(trace["z"][0]) == devices
    assert sum(trace["z"][0]) == pytest.approx(1)
    steps = [step["label"] for one in drawn["layout"].get("sliders", []) for step in one["steps"]]
    assert steps == (["2", "3", "12"] if devices <= 8 else [])
    assert "the common adapter" in trace["hovertext"][0][0]


def test_colours_are_scaled_to_how_far_others_are_trusted() -> None:
    """Of 20 devices each has a twentieth or so: next to 1 all cells were blank."""
    for devices, has_scale in ((6, False), (20, True)):
        summary = with_trust(demo_summary(devices), 11, 12)
        (trace,) = page_of(summary).figures()["trust"]["data"]
        shown = [e["trust"]["weights"] for e in summary["history"] if "trust" in e]
        others = [
            [w for i, row in enumerate(weights) for j, w in enumerate(row) if i != j]
            for weights in (shown[-1:] if has_scale else shown)
        ]
        assert trace["zmin"] == 0
        assert trace["zmax"] == pytest.approx(max(map(max, others)))
        assert trace["showscale"] == has_scale
        assert trace["colorbar"]["tickvals"][-1] == trace["zmax"]
        assert trace["hovertext"][0][1].count("%") == 1
    (trace,) = page_of(with_trust(demo_summary(1), 12)).figures()["trust"]["data"]
    assert trace["zmax"] == 1, "it is all its own"


def test_a_device_that_took_no_part_has_no_cell_in_the_matrix() -> None:
    page = page_of(with_trust(demo_summary(), 11, away=2))
    (trace,) = page.figures()["trust"]["data"]
    assert trace["z"][1] == [None] * 6 and trace["z"][2][:2] == [None, None]
    assert sum(trace["z"][2][2:]) == pytest.approx(1)
    assert "round 11" in "".join(page.text)
