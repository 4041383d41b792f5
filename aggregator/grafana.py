"""The Grafana dashboard of a fleet, as JSON: `python -m aggregator.grafana > tunefleet.json`.

It is made here so that its panels and the metrics of `aggregator.metrics` stay together, and is
kept in deploy/grafana, for who imports it without this package.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

JOB = '{job=~"$job"}'
WIDTH = 24
SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it asks Prometheus, and how it shows the answer."""

    title: str
    queries: dict[str, str]
    """Legend → PromQL."""
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    stacked: bool = False


ONLINE = 'sum(tunefleet_devices{job=~"$job",state!="offline"})'
ROUND = {"{{job}}": f"tunefleet_round_number{JOB}", "of": f"tunefleet_rounds_planned{JOB}"}
PANELS = (
    Panel("Online", {"online": ONLINE}, "stat", width=4, height=4),
    Panel("Ready", {"ready": f"sum(tunefleet_devices_ready{JOB})"}, "stat", width=4, height=4),
    Panel(
        "Kept out", {"kept out": f"sum(tunefleet_devices_quarantined{JOB})"},
        "stat", width=4, height=4,
    ),
    Panel("Round", ROUND, "stat", width=4, height=4),
    Panel("Version", {"{{job}}": f"tunefleet_version_number{JOB}"}, "stat", width=4, height=4),
    Panel(
        "Until the deadline",
        {"{{job}}": f"tunefleet_round_deadline_timestamp_seconds{JOB} - time()"},
        "stat", unit="s", width=4, height=4,
    ),
    Panel(
        "Devices by state",
        {"{{state}}": f"sum by (state) (tunefleet_devices{JOB})"},
        width=12, stacked=True,
    ),
    Panel(
        "The open round",
        {
            "delivered, {{job}}": f"tunefleet_round_delivered_devices{JOB}",
            "refused, {{job}}": f"tunefleet_round_refused_devices{JOB}",
            "quorum, {{job}}": f"tunefleet_round_quorum_devices{JOB}",
            "attempt, {{job}}": f"tunefleet_round_attempt{JOB}",
        },
        width=12,
    ),
    Panel("Held-out loss, nats a token", {"{{job}}": f"tunefleet_held_out_loss_nats{JOB}"}),
    Panel(
        "Merge time",
        {
            "median, {{job}}": "histogram_quantile(0.5, sum by (job, le) "
            f"(rate(tunefleet_merge_duration_seconds_bucket{JOB}[1h])))",
            "mean, {{job}}": f"rate(tunefleet_merge_duration_seconds_sum{JOB}[1h]) / "
            f"rate(tunefleet_merge_duration_seconds_count{JOB}[1h])",
        },
        unit="s",
    ),
    Panel(
        "What a merge could not hold", {"{{job}}": f"tunefleet_merge_residual_ratio{JOB}"},
        unit="percentunit",
    ),
    Panel(
        "Ranks delivered in the last round",
        {"rank {{rank}}": f"sum by (rank) (tunefleet_round_rank_devices{JOB})"},
        stacked=True,
    ),
    Panel(
        "Updates a minute",
        {"{{outcome}}, {{job}}": f"60 * rate(tunefleet_updates_total{JOB}[5m])"},
    ),
    Panel(
        "Bytes a second",
        {
            "up, {{job}}": f"rate(tunefleet_update_bytes_total{JOB}[5m])",
            "down, {{job}}": f"rate(tunefleet_download_bytes_total{JOB}[5m])",
        },
        unit="Bps",
    ),
    Panel(
        "Jobs",
        {
            "{{job}} {{state}}": f"tunefleet_job_state{JOB} == 1",
            "{{job}} paused": f"tunefleet_job_paused{JOB} == 1",
            "{{job}} not served": f"tunefleet_job_served{JOB} == 0",
            "unreadable": "tunefleet_jobs_unreadable > 0",
        },
        width=12,
    ),
    Panel(
        "The aggregator's memory", {"resident": "process_resident_memory_bytes"},
        unit="bytes", width=12,
    ),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(PANELS, 1):
        if x + panel.width > WIDTH:
            x, y, row = 0, y + row, 0
        panels.append(_panel(panel, number, x, y))
        x, row = x + panel.width, max(row, panel.height)
    job = "label_values(tunefleet_round_number, job)"
    return {
        "uid": "tunefleet",
        "title": "Tunefleet",
        "description": "A fleet of devices that fine-tune together.",
        "tags": ["tunefleet"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "job",
                    "label": "Job",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": job,
                    "definition": job,
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": panels,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 2, "showPoints": "never"}
    if panel.stacked:
        custom |= {"fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}
    return {
        "id": number,
        "title": panel.title,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom if panel.kind != "stat" else {}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}}
        if panel.kind != "stat"
        else {
            "colorMode": "none",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"]},
        },
        "targets": [
            {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
