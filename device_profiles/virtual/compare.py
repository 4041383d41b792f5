"""Compare two replays of traces: what they followed from, what each round came to, as a picture."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
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
    ("merged_s", "Virtual time at which each round was merged, hours", 1 / 3600),
    ("counted", "Updates that counted in each round", 1.0),
    ("ranks", "Mean rank of the updates that counted", 1.0),
    ("bytes", "Bytes of the updates that counted, MB", 1e-6),
    ("loss", "Held-out loss that devices which train began the round with, nats a token", 1.0),
)
"""Field of a round, what it shows, and what it is multiplied with."""
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
    both("last loss", lambda run: _last(run.rounds, "loss"))
    both("time it took", lambda run: human_seconds(run.result["wall_s"]))
    both("adapter", lambda run: str(run.result["adapter_sha256"])[:16])
    return rows


def write_picture(one: Run, other: Run, path: Path) -> None:
    """Write one HTML file with all charts, which needs no network.

    Raises:
        ReplayError: it can't be written.
    """
    from plotly.offline import get_plotlyjs  # heavy: only the picture needs it

    figures = [_figure(field, title, factor, (one, other)) for field, title, factor in CHARTS]
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


def _figure(field: str, title: str, factor: float, runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for run, colour in zip(runs, COLOURS, strict=True):
        known = [(r["round"], r[field]) for r in run.rounds if r.get(field) is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(run.folder.name),
                "x": [number for number, _ in known],
                "y": [value * factor for _, value in known],
                "line": {"color": colour},
            }
        )
    return {
        "data": traces,
        "layout": {
            "title": {"text": html.escape(title), "font": {"size": 15}},
            "height": 300,
            "margin": {"l": 60, "r": 20, "t": 50, "b": 40},
            "xaxis": {"title": {"text": "round"}, "dtick": 1 if len(traces[0]["x"]) < 20 else None},
            "yaxis": {"rangemode": "tozero" if field != "loss" else "normal"},
        },
    }


def _last(rounds: Sequence[dict[str, Any]], field: str) -> str:
    known = [r[field] for r in rounds if r.get(field) is not None]
    return f"{known[-1]:.4f}" if known else "–"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
