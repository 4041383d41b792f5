"""Compare two replays of traces: what they followed from, what each round came to, as a picture."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from device_profiles.errors import ReplayError
from device_profiles.virtual.options import RunRecord, read_record
from device_profiles.virtual.run import RESULT
from protocol.errors import os_words
from protocol.human import human_bytes, human_seconds

COLOURS = ("#2f6fde", "#d1622b")
"""Of the first run and the second."""
CHARTS = (
    (
        "merged_s",
        "version_loss",
        "Held-out loss of each version over virtual time, nats a token",
        1,
    ),
    ("round", "merged_s", "Virtual time at which each round was merged, hours", 1 / 3600),
    ("round", "counted", "Updates that counted in each round", 1),
    ("round", "ranks", "Mean rank of the updates that counted", 1),
    ("round", "bytes", "Bytes of the updates that counted, MB", 1e-6),
    ("round", "loss", "Held-out loss that who trains began the round with, nats a token", 1),
)
"""Fields of a round across and up, what they show, and what the second is multiplied with."""
ACROSS = {"round": ("round", 1.0), "merged_s": ("hours", 1 / 3600)}
"""Field → what an axis says of it, and what it is multiplied with."""
ALIKE = 1e-5
"""Two base losses nearer than this, in proportion, are of the same text and devices."""
ELSEWHERE = ("job", "pool", "memory_scale")
"""Options that are compared by what they came to."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


class Run:
    """Read a run's log and result.

    Raises:
        ReplayError: one of them is not there, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: RunRecord = read_record(folder)
        try:
            self.result: dict[str, Any] = json.loads((folder / RESULT).read_bytes())
            self.rounds: list[dict[str, Any]] = self.result["rounds"]
        except FileNotFoundError:
            raise ReplayError(
                f"{folder} came to no result: `fleet-replay again {folder}` replays it"
            ) from None
        except OSError as error:
            raise ReplayError(f"can't read the result of {folder}: {os_words(error)}") from None
        except (ValueError, LookupError, TypeError):
            raise ReplayError(f"{folder / RESULT} is damaged") from None

    def reached_s(self, loss: float) -> float | None:
        """Return the virtual time of the first version whose loss is not above another."""
        known = ((r.get("version_loss"), r["merged_s"]) for r in self.rounds)
        return next((at for found, at in known if found is not None and found <= loss), None)

    @property
    def lowest_loss(self) -> float | None:
        """The lowest loss of a version; None where none was measured."""
        known = (r.get("version_loss") for r in self.rounds)
        return min((loss for loss in known if loss is not None), default=None)


def common_loss(one: Run, other: Run) -> float | None:
    """Return the lowest loss that both came to; None where they can't be compared.

    They can where both were measured on the same text and devices: there the base has one loss.
    """
    base, others = one.result.get("base_loss"), other.result.get("base_loss")
    if base is None or others is None or not isclose(base, others, rel_tol=ALIKE):
        return None
    lowest = [loss for run in (one, other) if (loss := run.lowest_loss) is not None]
    return max(lowest) if len(lowest) == 2 else None


def same_result(one: Run, other: Run) -> tuple[bool, str]:
    """Say whether two runs came to the same, bit for bit, and else where they part."""
    for a, b in zip(one.rounds, other.rounds, strict=False):
        if a["updates_sha256"] != b["updates_sha256"]:
            counts = f"{a['counted']} and {b['counted']} updates"
            return False, f"round {a['round']}: other updates counted ({counts})"
        if a["version_sha256"] != b["version_sha256"]:
            return False, f"round {a['round']}: the same updates were merged into another version"
    if len(one.rounds) != len(other.rounds):
        return False, f"{len(one.rounds)} rounds, and {len(other.rounds)}"
    if one.result["adapter_sha256"] != other.result["adapter_sha256"]:
        return False, "the adapters differ"
    return True, f"the same adapter, bit for bit: {one.result['adapter_sha256'][:16]}"


def differences(one: Run, other: Run) -> Iterator[tuple[str, str, str]]:
    """Yield what the two followed from that is not the same: name, one's, the other's."""
    for name, fields in (("", "options"), ("job.", "job"), ("policy.", "policy")):
        a, b = getattr(one.record, fields), getattr(other.record, fields)
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key) and not (fields == "options" and key in ELSEWHERE):
                yield name + key, _short(a.get(key)), _short(b.get(key))


def table(one: Run, other: Run) -> list[tuple[str, str, str]]:
    """Return the rows of what the two came to: name, one's, the other's."""
    rows = [*differences(one, other)]

    def both(name: str, show: Any) -> None:
        rows.append((name, show(one), show(other)))

    if one.record.pool != other.record.pool:
        both("pool", lambda run: str(run.record.pool)[:16])
    both("ended", lambda run: run.result["ended"])
    both("rounds merged", lambda run: str(sum(1 for r in run.rounds if r["version"])))
    both("updates counted", lambda run: str(sum(r["counted"] for r in run.rounds)))
    both("of them late", lambda run: str(sum(r["late"] for r in run.rounds)))
    both("virtual time", lambda run: human_seconds(run.result["virtual_s"]))
    both("bytes up", lambda run: human_bytes(run.result["bytes_up"]))
    both("bytes down", lambda run: human_bytes(run.result["bytes_down"]))
    both("loss begun with, last", lambda run: _last(run.rounds, "loss"))
    both("last version's loss", lambda run: _last(run.rounds, "version_loss"))
    if (loss := common_loss(one, other)) is not None:
        both(
            f"virtual time to a loss of {loss:.4f}", lambda run: human_seconds(run.reached_s(loss))
        )
    both("time it took", lambda run: human_seconds(run.result["wall_s"]))
    both("adapter", lambda run: str(run.result["adapter_sha256"])[:16])
    return rows


def write_picture(one: Run, other: Run, path: Path) -> None:
    """Write one HTML file with all charts, which needs no network.

    Raises:
        ReplayError: it can't be written.
    """
    from plotly.offline import get_plotlyjs  # heavy: only the picture needs it

    figures = [_figure(a, b, title, by, (one, other)) for a, b, title, by in CHARTS]
    divs = "\n".join(f'<div id="chart{i}"></div>' for i in range(len(figures)))
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table(one, other)
    )
    data = json.dumps(figures).replace("<", "\\u003c")
    names = [html.escape(str(run.folder)) for run in (one, other)]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Two replays</title>
<style>body{{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
td,th{{text-align:left;padding:.15rem 1rem .15rem 0}}</style>
<h1>Two replays</h1>
<table><tr><th></th><th style="color:{COLOURS[0]}">{names[0]}</th>
<th style="color:{COLOURS[1]}">{names[1]}</th></tr>
{cells}</table>
{divs}
<script>{get_plotlyjs()}</script>
<script>({data}).forEach((f, i) =>
  Plotly.newPlot("chart" + i, f.data, f.layout, {{displayModeBar: false, responsive: true}}))
</script></html>
"""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReplayError(f"can't write the picture: {os_words(error)}") from None


def _figure(
    across: str, field: str, title: str, factor: float, runs: Sequence[Run]
) -> dict[str, Any]:
    traces = []
    unit, scale = ACROSS[across]
    for run, colour in zip(runs, COLOURS, strict=True):
        known = [
            (r[across] * scale, r[field] * factor) for r in run.rounds if r.get(field) is not None
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(run.folder.name),
                "x": [x for x, _ in known],
                "y": [y for _, y in known],
                "line": {"color": colour},
            }
        )
    every_one = across == "round" and len(traces[0]["x"]) < 20
    return {
        "data": traces,
        "layout": {
            "title": {"text": html.escape(title), "font": {"size": 15}},
            "height": 300,
            "margin": {"l": 60, "r": 20, "t": 50, "b": 40},
            "xaxis": {"title": {"text": unit}, "dtick": 1 if every_one else None},
            "yaxis": {"rangemode": "normal" if field.endswith("loss") else "tozero"},
        },
    }


def _last(rounds: Sequence[dict[str, Any]], field: str) -> str:
    known = [r[field] for r in rounds if r.get(field) is not None]
    return f"{known[-1]:.4f}" if known else "–"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
