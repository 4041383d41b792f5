"""Charts: what is drawn is what was given, at every size."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.issued import TrustMatrix
from aggregator.page.charts.frame import HEIGHT_PX, scale_of
from aggregator.page.charts.heat import CELLS, block_size, heat_map
from aggregator.page.charts.rounds import (
    loss_chart,
    merge_chart,
    rank_chart,
    shades_of,
    traffic_chart,
)
from aggregator.view import RoundView

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


def made_round(number: int, **fields: object) -> RoundView:
    told = {
        "version": number + 1, "opened": 1.0, "ended": 2.0, "note": "", "merge_s": 0.5,
        "loss": 3.0, "counted": 3, "refused": 0, "ranks": {4: 2, 8: 1}, "up_bytes": 5000,
        "down_bytes": 4000, "residual": 0.1, **fields,
    }  # fmt: skip
    return RoundView(number=number, **told)  # type: ignore[arg-type]


def marks(chart: str | None, kind: str) -> list[ElementTree.Element]:
    """Return the elements of a chart with a class, and see that it is well-formed."""
    assert chart is not None
    found = ElementTree.fromstring(str(chart)).iter()
    return [one for one in found if kind in one.get("class", "").split()]


@given(NUMBERS, NUMBERS)
def test_a_scale_holds_its_values(one: float, other: float) -> None:
    low, high = sorted((one, other))
    scale = scale_of(low, high)
    hair = 1e-6 * (scale.high - scale.low)
    assert scale.low - hair <= low <= high <= scale.high + hair
    assert 2 <= len(scale.ticks) <= 12
    assert -0.01 <= scale.y(high) <= scale.y(low) <= HEIGHT_PX + 0.01


def test_every_round_has_its_column_and_tells_its_figures() -> None:
    rounds = [made_round(n, loss=4 - n / 10, merge_s=n / 4) for n in range(1, 6)]
    for chart in (
        loss_chart(rounds, {"kitchen": [3.9, None, 3.7, 3.6, 3.5]}),
        merge_chart(rounds),
        rank_chart(rounds, shades_of([4, 8])),
        traffic_chart(rounds),
    ):
        tips = [mark.get("data-tip", "") for mark in marks(chart, "hit")]
        assert [tip.split("\n")[0] for tip in tips] == [f"round {n}" for n in range(1, 6)]
    tips = [m.get("data-tip", "") for m in marks(loss_chart(rounds, {"kitchen": [1.5] * 5}), "hit")]
    assert tips[1] == "round 2\n3.8000 mean\n1.5000 kitchen"


def test_ranks_are_stacked_without_a_gap() -> None:
    chart = rank_chart([made_round(1, ranks={2: 1, 4: 2, 8: 3})], shades_of([2, 4, 8]))
    bars = [one for shade in ("r0", "r4", "r7") for one in marks(chart, shade)]
    heights = [float(bar.get("height", "")) for bar in bars]
    tops = [float(bar.get("y", "")) for bar in bars]
    assert heights == pytest.approx([HEIGHT_PX / 6, HEIGHT_PX / 3, HEIGHT_PX / 2], abs=0.02)
    assert tops[0] == pytest.approx(tops[1] + heights[1], abs=0.02)
    assert tops[1] == pytest.approx(tops[2] + heights[2], abs=0.02)


def test_a_loss_that_nobody_told_leaves_a_gap() -> None:
    losses = [3.0, 2.9, None, 2.7, 2.6]
    rounds = [made_round(n, loss=loss) for n, loss in enumerate(losses, 1)]
    chart = str(loss_chart(rounds))
    (line,) = re.findall(r'<path class="line mean" d="([^"]*)"', chart)
    assert line.count("M") == 2, "two pieces of two rounds"
    assert len(marks(chart, "mean")) == 1 + 4, "the line, and a dot for each round that has one"


def test_a_loss_that_can_not_be_is_not_drawn() -> None:
    losses = [3.0, 1.7e308, float("inf"), 2.8]
    rounds = [made_round(n, loss=loss) for n, loss in enumerate(losses, 1)]
    chart = loss_chart(rounds, {"liar": [-1.7e308, 3.0, float("nan"), 2.9]}, [(1.0, 9e99)] * 4)
    dots = marks(chart, "mean")
    assert len([one for one in dots if one.get("r")]) == 2
    assert all(0 <= float(one.get("cy", "0")) <= HEIGHT_PX for one in dots)


def test_nothing_to_draw_is_nothing() -> None:
    empty = made_round(1, loss=None, merge_s=None, ranks={}, up_bytes=0, down_bytes=0)
    assert loss_chart([empty]) is merge_chart([empty]) is traffic_chart([empty]) is None
    assert rank_chart([], {}) is None


def test_a_few_round_numbers_stand_below_many_columns() -> None:
    labels = [t.text for t in marks(merge_chart([made_round(n) for n in range(1, 121)]), "x")[0]]
    assert labels == [str(n) for n in range(10, 121, 10)]


@given(st.integers(1, 300))
def test_blocks_of_a_heat_map_share_out_each_row(devices: int) -> None:
    names = [f"d{n:03}" for n in range(devices)]
    weights = [[1 / devices] * devices for _ in names]
    chart = heat_map(TrustMatrix(names, weights, {}, []), 7)
    rows = -(-devices // block_size(devices))
    assert rows <= CELLS
    cells = marks(chart, "hit")
    assert len(cells) == rows * rows
    shares = [float(cell.get("data-tip", "").split("\n")[1].split(" ")[0]) for cell in cells]
    assert sum(shares[:rows]) == pytest.approx(100, abs=0.06 * rows)


def test_names_are_escaped() -> None:
    chart = heat_map(TrustMatrix(['<img src="x">'], [[1.0]], {}, []), 1)
    assert "<img" not in str(chart)
