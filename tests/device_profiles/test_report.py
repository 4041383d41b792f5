"""The report is one safe file that says what the figures say."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from device_profiles.report import headline, render_report, write_report
from device_profiles.report_figure import EN_DASH, percent, spread
from device_profiles.summary import Summary, read_summary
from protocol.human import human_bytes, human_seconds

BOARDS = (
    # name, profile, title, text, budget and floor in MiB, rank_start, rank_end
    ("zero", "raspberry-pi-zero-2w", "Raspberry Pi Zero 2 W", "recipes", 96, 24, 2, 2),
    ("pi3", "raspberry-pi-3b-plus-1gb", "Raspberry Pi 3 B+", "letters", 208, 24, 4, 4),
    ("pi4", "raspberry-pi-4b-4gb", "Raspberry Pi 4 B", "Shakespeare, Hamlet", 520, 24, 16, 11),
    ("phone", "pixel-7", "Pixel 7", "chat", 640, 24, 16, 16),
    ("jetson", "jetson-nano-4gb", "Jetson Nano", "grade-school maths", 880, 24, 32, 21),
    ("laptop", "laptop-16gb", "Laptop, 16 GB", "Universal Dependencies", 2600, 24, 64, 64),
)
LOSSES = (
    # base, alone, merged
    (3.42, 2.93, 2.51),
    (3.18, 2.66, 2.42),
    (2.97, 2.31, 2.16),
    (3.31, 2.52, 2.37),
    (2.74, 1.98, 1.86),
    (3.05, 2.12, 2.17),
)


def demo_summary(devices: int = 6, rounds: int = 12, seed: int = 7) -> dict[str, Any]:
    """Return a summary as a replay of `devices` devices could end with; more than six repeat."""
    draw = random.Random(seed)
    fleet = [_demo_device(number, draw) for number in range(devices)]
    mean = {
        key: sum(device["loss"][key] for device in fleet) / len(fleet) for key in fleet[0]["loss"]
    }
    return {
        "rule": "flora-stack",
        "seed": seed,
        "rounds": rounds,
        "wall_s": 341.8,
        "base_model": "tunefleet-tiny",
        "base_parameters": 3_412_992,
        "memory_scale": 0.05,
        "ladder": [2, 4, 8, 16, 32, 64],
        "rank_max": 64,
        "remainder": "frozen",
        "directions": "top",
        "broker": "embedded (amqtt)",
        "loss": mean,
        "devices": fleet,
        "history": [_demo_round(number, rounds, fleet, draw) for number in range(1, rounds + 1)],
    }


def _demo_device(number: int, draw: random.Random) -> dict[str, Any]:
    name, profile, title, text, budget, floor, start, end = BOARDS[number % len(BOARDS)]
    base, alone, merged = (x + 0.05 * (number // len(BOARDS)) for x in LOSSES[number % 6])
    predicted = (budget - floor) * draw.uniform(0.62, 0.78)
    adapter_bytes = 21_000 * end + 9_000
    return {
        "name": name if number < len(BOARDS) else f"{name}-{number // len(BOARDS) + 1}",
        "profile": profile,
        "title": title,
        "text": text,
        "budget_mib": budget - floor,
        "floor_mib": floor,
        "predicted_mib": predicted,
        "peak_mib": predicted * draw.choice([0.86, 0.94, 1.03, 1.12, 1.31]),
        "rank_start": start,
        "rank_end": end,
        "held_rank": end,
        "plan": "1\N{MULTIPLICATION SIGN}256 tokens \N{MULTIPLICATION SIGN}4, checkpointing, bf16",
        "loss": {
            "base": base,
            "local": alone,
            "merged": merged,
            "merged_on_device": merged + 0.16 / start,
        },
        "bytes_up": 12 * adapter_bytes,
        "bytes_down": 13 * (adapter_bytes + 12_000),
        "tokens": 12 * 24 * 1024,
    }


def _demo_round(
    number: int, rounds: int, fleet: list[dict[str, Any]], draw: random.Random
) -> dict[str, Any]:
    present = [device for device in fleet if number == 1 or draw.random() > 0.08]
    shares = [math.sqrt(device["rank_end"]) * draw.uniform(0.8, 1.2) for device in present]
    return {
        "round": number,
        "version": number,
        "merge_s": draw.uniform(0.11, 0.22),
        "devices": {
            device["name"]: _demo_part(device, number, rounds, share / sum(shares), draw)
            for device, share in zip(present, shares, strict=True)
        },
    }


def _demo_part(
    device: dict[str, Any], number: int, rounds: int, weight: float, draw: random.Random
) -> dict[str, Any]:
    loss = device["loss"]
    left = math.exp(-3.2 * (number - 1) / rounds)
    noise = draw.gauss(0, 0.012) if number > 1 else 0
    held_out = loss["merged_on_device"] + (loss["base"] - loss["merged_on_device"]) * left + noise
    rank = device["rank_start"] if number <= 5 else device["rank_end"]
    return {
        "rank": rank,
        "loss": held_out,
        "train_loss": held_out - 0.2,
        "bytes_up": device["bytes_up"] // rounds,
        "bytes_down": device["bytes_down"] // rounds,
        "weight": weight,
    }


class _Page(HTMLParser):
    """Collect a page's scripts, text, and whatever could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            v or "" for k, v in attrs if k in {"src", "href", "srcset", "data", "action"}
        ]
        self.styles += [v or "" for k, v in attrs if k == "style"]

    def handle_data(self, data: str) -> None:
        where = {"script": self.scripts, "style": self.styles}
        where.get(self.lasttag if self.cdata_elem else "", self.text).append(data)

    def figures(self) -> dict[str, Any]:
        """Return the figures that the page draws."""
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page_of(summary: dict[str, Any]) -> _Page:
    return _Page(render_report(read_summary(summary)))


def in_light(figure: Any, is_colour: bool = False) -> Any:
    """Return a figure with every colour token made a colour, as the page's script does."""
    if isinstance(figure, dict):
        return {
            key: in_light(item, re.search(r"color(scale)?$", key) is not None)
            for key, item in figure.items()
        }
    if isinstance(figure, list):
        return [in_light(item, is_colour) for item in figure]
    if is_colour and isinstance(figure, str):
        return re.sub(r"^\$[a-z]+\d?(/[\d.]+)?$", "#123456", figure)
    return figure


def test_the_file_is_self_contained_and_small(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(demo_summary(), path)
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.loads == ["data:,"]
    assert not any(re.search(r"@import|url\(", style) for style in page.styles)
    assert "default-src 'none'" in text
    assert sum(script == get_plotlyjs() for script in page.scripts) == 1
    assert text.count(get_plotlyjs()) == 1
    assert len(text.encode()) < 8_000_000


@pytest.mark.parametrize("devices", [1, 6, 8, 9, 40])
def test_every_chart_is_a_figure_that_plotly_accepts(devices: int) -> None:
    page = page_of(demo_summary(devices))
    figures = page.figures()
    assert list(figures) == [
        "loss-rounds",
        "loss-devices",
        "memory",
        "traffic",
        "ranks",
        "weights",
    ]
    for figure in figures.values():
        drawn = in_light(figure)
        assert "$" not in json.dumps(drawn)
        go.Figure(drawn)
    assert page.tags.count("button") == devices


def test_a_device_has_one_colour_in_all_charts() -> None:
    def colours(value: Any) -> set[str]:
        return set(re.findall(r'"\$(d\d)', json.dumps(value)))

    for figure in page_of(demo_summary()).figures().values():
        own = [trace for trace in figure["data"] if "meta" in trace]
        assert {trace["meta"]["device"] for trace in own} == set(range(6))
        for trace in own:
            assert colours(trace) <= {f"d{trace['meta']['device']}"}


HOSTILE = "<b>x</b><script>alert(1)</script>&{{plotly}}%{x}$d0"


def test_a_device_name_is_shown_as_it_is_and_never_run() -> None:
    summary = demo_summary()
    renamed = json.loads(json.dumps(summary).replace('"pi4"', json.dumps(HOSTILE)))
    page, plain = page_of(renamed), page_of(summary)
    assert page.tags == plain.tags
    assert "".join(page.text).count(HOSTILE) >= 2
    assert len(page.scripts) == len(plain.scripts) == 3
    assert "<b>x" not in json.dumps(page.figures())
    assert "&lt;b&gt;x" in json.dumps(page.figures())
    assert "hovertemplate" not in page.scripts[0]


def test_every_device_name_is_in_the_page() -> None:
    text = "".join(page_of(demo_summary(40)).text)
    assert all(device["name"] in text for device in demo_summary(40)["devices"])


def test_no_history_leaves_the_charts_over_rounds_out() -> None:
    page = page_of(demo_summary() | {"history": []})
    assert list(page.figures()) == ["loss-devices", "memory", "traffic"]
    assert "No round was recorded." in page.text


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_figures_that_were_not_measured_are_left_out(gap: float | None) -> None:
    summary = demo_summary()
    summary["loss"] = dict.fromkeys(summary["loss"], gap)
    for device in summary["devices"]:
        device["loss"] = dict.fromkeys(device["loss"], gap)
        device |= {"peak_mib": gap, "predicted_mib": gap, "budget_mib": gap}
    for entry in summary["history"]:
        for part in entry["devices"].values():
            part |= {"loss": gap, "train_loss": gap, "weight": gap}
    page = page_of(summary)
    assert list(page.figures()) == ["traffic", "ranks"]
    assert f"6 devices, ranks 2{EN_DASH}64: no merged loss was measured" in page.text
    assert not re.search(r"\b(nan|inf)\b", "".join(page.text), re.IGNORECASE)


def test_nothing_is_said_of_a_budget_that_is_not_known() -> None:
    summary = demo_summary()
    assert "over its budget" in "".join(page_of(summary).text)
    for device in summary["devices"]:
        device["peak_mib"] = None
    assert "over its budget" not in "".join(page_of(summary).text)


def test_a_peak_over_its_budget_is_named() -> None:
    summary = demo_summary()
    summary["devices"][1]["peak_mib"] = 185.0
    assert "Over budget: pi3." in "".join(page_of(summary).text)


def test_the_table_compares_a_peak_with_its_prediction_and_its_budget() -> None:
    summary = demo_summary()
    summary["devices"][0] |= {"predicted_mib": 80, "peak_mib": 100, "budget_mib": 96}
    summary["devices"][1] |= {"predicted_mib": 200, "peak_mib": 120, "budget_mib": 240}
    page = render_report(read_summary(summary))
    assert f"<td>80</td><td>100<small>{percent(1.25)}</small></td>" in page
    assert f'<td class="late">96<small>over: {percent(100 / 96)}</small></td>' in page
    assert f'<td>200</td><td class="late">120<small>{percent(0.6)}</small></td>' in page
    assert ", 1 over budget" in page
    summary["devices"][0]["peak_mib"] = None
    assert ", none over budget" in render_report(read_summary(summary))


def test_one_diverged_device_does_not_hide_the_others() -> None:
    summary = demo_summary()
    summary["devices"][2]["loss"]["merged"] = math.nan
    summary["history"][4]["devices"]["pi4"] = {"rank": 11, "loss": math.nan}
    page = page_of(summary)
    assert next(iter(page.figures())) == "loss-rounds"
    assert any(note["text"] == "not measured" for note in _notes(page, "loss-devices"))


def _notes(page: _Page, slug: str) -> list[dict[str, Any]]:
    notes: list[dict[str, Any]] = page.figures()[slug]["layout"]["annotations"]
    return notes


def test_the_least_that_a_summary_can_be() -> None:
    page = page_of({})
    assert page.figures() == {}
    assert "0 devices: no merged loss was measured" in page.text
    assert list(page_of({"devices": [{"name": "only"}]}).figures()) == []


def test_the_page_compares_adapters_across_the_whole_fleet() -> None:
    across = {"base": 2.9, "local": 3.0, "merged": 2.7}
    text = " ".join(page_of({"across": across}).text)
    assert "below adapters trained alone (2.70 against 3.00)" in text


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"local": 2.5, "merged": 2.3}, "merged 2.30 nats/token, 8 % below training alone"),
        ({"local": 2.5, "merged": 2.6}, "merged 2.60 nats/token, 4 % above training alone"),
        ({"local": 2.5, "merged": 2.49}, "merged 2.49 nats/token, level with training alone"),
        ({"base": 3.0, "merged": 2.7}, "merged 2.70 nats/token, 10 % below the base model"),
        ({"merged": 2.7}, "merged 2.70 nats/token, with nothing to compare it to"),
        ({"local": 2.5}, "no merged loss was measured"),
    ],
)
def test_the_headline_says_what_the_figures_say(loss: dict[str, float], said: str) -> None:
    one = {"name": "a", "rank_start": 8, "rank_end": 8}
    told = headline(Summary.model_validate({"loss": loss, "devices": [one]}))
    assert told.replace("\N{NARROW NO-BREAK SPACE}", " ") == f"1 device, rank 8: {said}"


def test_a_replay_in_which_merging_lost_says_so() -> None:
    summary = demo_summary()
    for device in summary["devices"]:
        device["loss"]["merged"] = device["loss"]["local"] * 1.1
    summary["loss"] = {}
    text = "".join(page_of(summary).text)
    assert "10\N{NARROW NO-BREAK SPACE}% above training alone" in text
    assert "With merging, 0 of 6 devices end with a lower held-out loss" in text
    assert "merging did not pay" in text
    assert "No device gains" in text


def test_the_best_loss_of_each_row_is_bold() -> None:
    page = render_report(read_summary(demo_summary(1)))
    assert "<td>2.930</td><td><b>2.510</b></td>" in page


@given(st.lists(st.floats(-1e4, 1e4), max_size=12), st.floats(0.1, 100))
def test_spread_keeps_order_and_distance(positions: list[float], gap: float) -> None:
    moved = spread(positions, gap)
    pairs = sorted(zip(positions, moved, strict=True))
    assert sorted(moved) == pytest.approx([y for _, y in pairs], abs=1e-6) or len(
        set(positions)
    ) < len(positions)
    apart = [b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)]
    assert all(distance >= gap - 1e-6 for distance in apart)
    assert math.fsum(moved) == pytest.approx(math.fsum(positions), abs=1e-4)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_204_000, "4.20 MB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (31 * 10**9, "31.0 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes_are_said_with_three_figures(count: int, said: str) -> None:
    assert human_bytes(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.184, "0.18 s"),
        (42, "42 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations_carry_their_unit(seconds: float, said: str) -> None:
    assert human_seconds(seconds) == said


def test_small_percentages_keep_a_digit() -> None:
    said = [percent(share).replace("\N{NARROW NO-BREAK SPACE}", " ") for share in (0.004, -0.083)]
    assert said == ["0.4 %", "8 %"]
