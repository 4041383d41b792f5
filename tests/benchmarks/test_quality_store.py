"""Published results: added to, and taken in the place of runs that are not here."""

from pathlib import Path

import pytest

from benchmarks.quality import store
from benchmarks.quality.__main__ import Bench
from benchmarks.quality.arms import DEFAULT, Result, Schedule
from benchmarks.quality.store import Case, read_published, write_published


def result(loss: float) -> Result:
    return Result(loss, loss, {"d0": loss}, [loss], 1.0, {"shares": {"d0": 0.1}})


def case(seed: int) -> Case:
    return Case("made", "toy", DEFAULT, seed, 8e-3, Schedule())


def test_results_are_added_to_what_was_published(tmp_path: Path) -> None:
    write_published(tmp_path, {"b": result(2.0), "a": result(1.0)})
    write_published(tmp_path, {"c": result(3.0), "a": result(1.5)})
    kept = read_published(tmp_path)
    assert {name: found.held_out for name, found in kept.items()} == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert list(kept) == ["a", "b", "c"] and kept["c"] == result(3.0)


def test_a_table_has_runs_of_here_and_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RUNS", tmp_path / "runs")
    write_published(tmp_path, {case(0).path.name: result(3.0), case(1).path.name: result(4.0)})
    case(1).write(result(3.5))
    for published, seen in ((tmp_path, {0: 3.0, 1: 3.5}), (None, {})):
        bench = Bench(tmp_path, "made", "toy", Schedule(), published)
        assert bench.sheet([DEFAULT], [0, 1, 2]).losses(DEFAULT) == seen
        assert {r.held_out for r in bench.used.values()} == set(seen.values())
