"""What Prometheus reads: its own tool accepts it, the store has it, and Grafana asks for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.grafana import dashboard
from aggregator.metrics import BUCKETS_S, expose
from aggregator.view import FleetReader, StateView
from benchmarks.made_fleet import made_fleet

ROOT = Path(__file__).parents[3]
PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=Path(sys.executable).parent)
PROCESS = {"process_resident_memory_bytes"}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("states")
    made_fleet(root / "notes", devices=20, rounds=5)
    made_fleet(root / "letters", devices=0, rounds=0, name="letters")
    return root


@pytest.fixture(scope="module")
def text(states: Path) -> str:
    reader = FleetReader(states)
    try:
        return expose(reader)[0].decode()
    finally:
        reader.close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples
    }


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_has_nothing_to_say(text: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_numbers_are_the_stores(states: Path, text: str) -> None:
    found = samples(text)
    with StateView(states / "notes") as view:
        job, totals, rounds = view.job(), view.totals(BUCKETS_S), view.rounds(limit=100)
    here = ("job", "notes")
    for state, number in job.devices.by_state.items():
        assert found["tunefleet_devices", (here, ("state", state))] == number
    assert found["tunefleet_round_number", (here,)] == job.round == 6
    assert found["tunefleet_version_number", (here,)] == job.version
    assert found["tunefleet_update_bytes_total", (here,)] == job.up_bytes
    counted = ("outcome", "counted")
    assert found["tunefleet_updates_total", (here, counted)] == totals.counted
    merges = [one.merge_s for one in rounds if one.merge_s is not None]
    assert found["tunefleet_merge_duration_seconds_count", (here,)] == len(merges) == 5
    assert found["tunefleet_merge_duration_seconds_sum", (here,)] == pytest.approx(sum(merges))
    for bound in BUCKETS_S:
        within = found["tunefleet_merge_duration_seconds_bucket", (here, ("le", str(bound)))]
        assert within == sum(merge <= bound for merge in merges)


def test_names_are_ours_and_no_label_is_a_device(text: str) -> None:
    names = {name for name, _ in samples(text)}
    assert all(name.startswith(("tunefleet_", "process_")) for name in names)
    assert "device-00" not in text
    labels = {label for _, pairs in samples(text) for label, _ in pairs}
    assert labels == {"job", "state", "outcome", "rank", "le"}


def test_openmetrics_is_told_to_who_asks_for_it(states: Path) -> None:
    reader = FleetReader(states)
    data, kind = expose(reader, "application/openmetrics-text; version=1.0.0")
    reader.close()
    assert kind.startswith("application/openmetrics-text")
    assert data.endswith(b"# EOF\n")


def test_grafana_asks_for_what_there_is(text: str) -> None:
    """Every metric in a panel is told, and every one that is told of a fleet is in a panel."""
    names = {name for name, _ in samples(text)}
    queries = [t["expr"] for panel in dashboard()["panels"] for t in panel["targets"]]
    asked = {name for q in queries for name in re.findall(r"\b(?:tunefleet|process)_\w+", q)}
    assert asked <= names
    base = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names | asked}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert {name for name in base if name.startswith("tunefleet_")} <= shown
    labels = {label for q in queries for label in re.findall(r"by \(([^)]*)\)", q)}
    assert {one.strip() for label in labels for one in label.split(",")} <= {
        "job", "state", "rank", "le",
    }  # fmt: skip


def test_the_dashboard_that_is_shipped_is_this_one() -> None:
    shipped = ROOT / "deploy" / "grafana" / "tunefleet.json"
    assert json.loads(shipped.read_text()) == dashboard(), (
        "python -m aggregator.grafana > deploy/grafana/tunefleet.json"
    )


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
