"""Probes measure what the limit leaves room for, longer ones only when shorter ones say so."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import base_tiny
import edge_client.trainer.probing as probing
from edge_client.calibrate import (
    ProbingProcess,
    _from_fields,
    _remembered,
    _to_json,
    choose_threads,
    tokens_s,
)
from edge_client.memory import Probe, Way, fit, predict_mib
from edge_client.trainer.probing import (
    PROBE_HELD,
    PROBE_RANK,
    Prober,
    ProbeReport,
    ProbeTask,
    fewest_near_fastest,
    worth_timing,
)
from edge_client.trainer.worker import OUT_OF_MEMORY, _answer
from protocol.messages import BaseModelInfo

FLOOR, WEIGHTS, FIXED = 400.0, 100.0, 20.0
SLOPE = {True: 0.1, False: 0.5}
WIDE = {f"layers.{n}.q": (16 << 10, 16 << 10) for n in range(4)}
"""Modules of which a token may take 0.75 MiB."""
SHAPES = {f"layers.{n}.q": (64, 64) for n in range(4)}


class Told(Prober):
    """Probe steps whose peaks are told by a line, and kept."""

    def __init__(self, limit_mib: float, token_s: float = 0.01) -> None:
        self.token_s = token_s
        task = ProbeTask(Path(), "f32", WEIGHTS, 1, 256, 2.0, limit_mib=limit_mib)
        super().__init__(cast("Any", SimpleNamespace(shapes=WIDE)), task, FLOOR)
        self.peaks: list[float] = []

    def _probe(self, rows: int, length: int, checkpointing: bool) -> tuple[float, float]:
        self.peaks.append(FLOOR + WEIGHTS + FIXED + rows * length * SLOPE[checkpointing])
        return self.peaks[-1], self.token_s * rows * length


@pytest.fixture(autouse=True)
def _resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "resident_mib", lambda: FLOOR + WEIGHTS)


def test_without_a_limit_the_two_longest_probes_are_of_whole_sequences() -> None:
    found, complete = Told(inf).ways(256)
    assert complete
    for checkpointing, probes in found.items():
        assert [probe.tokens for probe in probes] == [64, 256, 512]
        whole = WEIGHTS + FIXED + 512 * SLOPE[checkpointing]
        assert probes[-1].peak_mib == pytest.approx(whole)


@pytest.mark.parametrize("limit", range(500, 900, 10))
def test_no_probe_goes_beyond_the_limit_and_what_is_told_is_worth_planning_with(limit: int) -> None:
    prober = Told(limit)
    found, complete = prober.ways(256)
    first = FLOOR + WEIGHTS + FIXED + 64 * SLOPE[True]  # of which nothing was known
    assert all(peak <= limit for peak in prober.peaks if peak > first)
    if limit > 820:
        assert complete
    for probes in found.values():
        assert len(probes) > 1
    if limit > 580:
        assert True in found
    if limit > 700:
        assert False in found


@pytest.mark.parametrize("length", [16, 64, 100, 1024])
def test_every_length_is_probed_whole_and_twice_that(length: int) -> None:
    found, _ = Told(inf).ways(length)
    assert [p.tokens for p in found[False]][-2:] == [length, 2 * length]


@pytest.mark.parametrize(("token_s", "tokens"), [(1.0, [64, 128]), (0.3, [64, 256])])
def test_where_steps_take_very_long_there_are_two_probes(token_s: float, tokens: list[int]) -> None:
    prober = Told(inf, token_s)
    found, complete = prober.ways(256)
    assert complete, "more memory would not make it faster"
    assert [[p.tokens for p in probes] for probes in found.values()] == [tokens, tokens]


def test_where_a_step_takes_very_long_no_other_count_of_threads_is_timed() -> None:
    slow, quick = Told(inf, token_s=1.0), Told(inf)
    for prober in (slow, quick):
        cast("Any", prober)._trainer.use_threads = lambda _: None
    assert slow.threads(4) == 4
    assert len(slow.peaks) == 1
    quick.threads(4)
    assert len(quick.peaks) > 1


def test_the_fewest_threads_that_are_about_as_fast_are_taken() -> None:
    assert fewest_near_fastest({4: 1.0, 3: 1.2, 2: 1.5, 1: 3.0}) == 4
    assert fewest_near_fastest({4: 1.0, 3: 1.03, 2: 1.5, 1: 3.0}) == 3
    assert fewest_near_fastest({4: 2.0, 3: 1.5, 2: 1.0, 1: 1.04}) == 1


def test_long_steps_and_threads_far_from_the_fastest_are_timed_once() -> None:
    assert worth_timing({4: inf, 2: inf, 1: inf}) == [4, 2, 1]
    assert worth_timing({4: 0.4, 2: 0.5, 1: 0.9}) == [4, 2]
    assert worth_timing({4: 1.4, 2: 1.5, 1: 3.0}) == []


def test_the_faster_of_the_two_longest_probes_is_the_speed() -> None:
    probes = [Probe(t, 8, 16, 1.0, s) for t, s in ((512, 6.0), (64, 0.1), (256, 2.0))]
    assert tokens_s(probes) == 128


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_that_grows_in_proportion_is_predicted_from_its_probes(checkpointing: bool) -> None:
    way = Way("f32", checkpointing)

    def peak(tokens: int, rank: int, held: int) -> float:
        return predict_mib(
            SHAPES,
            weights_mib=WEIGHTS,
            activations=fit(probes, SHAPES, WEIGHTS, way),
            way=way,
            rank=rank,
            held=held,
            tokens=tokens,
            accumulates=False,
        )

    told, _ = Told(inf).ways(256)
    probes = told[checkpointing]
    for probe in probes:
        assert peak(probe.tokens, PROBE_RANK, PROBE_HELD) == pytest.approx(probe.peak_mib)
    longer = WEIGHTS + FIXED + 2048 * SLOPE[checkpointing]  # steeper than what modules keep
    assert peak(2048, PROBE_RANK, PROBE_HELD) == pytest.approx(longer)
    assert peak(2048, 64, 64) > longer


def test_a_short_probe_whose_peak_is_elsewhere_does_not_bend_the_line() -> None:
    """A chunk of logits, say, is largest in short steps: then it is what those take."""
    way = Way("f32", True)
    probes = [Probe(t, 8, 16, WEIGHTS + max(50.0, 0.2 * t), 1.0) for t in (64, 256, 512)]
    found = fit(probes, SHAPES, WEIGHTS, way)
    assert found.token_mib == pytest.approx(0.2)
    at = found.fixed_mib + found.beside_mib(64)
    assert at == pytest.approx(found.least_mib)
    assert found.fixed_mib + found.beside_mib(1024) > at


def test_what_a_low_limit_left_out_is_measured_when_there_is_more_memory(tmp_path: Path) -> None:
    low = ProbeReport(1.0, 2.0, {True: (Probe(64, 8, 16, 3.0, 4.0),) * 2}, 500.0, complete=False)
    full = ProbeReport(1.0, 2.0, {}, inf, complete=True)
    path = tmp_path / "one.json"

    def never() -> ProbeReport:
        raise AssertionError("it is remembered")

    assert _remembered(path, 500.0, lambda: low) == low
    assert _remembered(path, 510.0, never) == low
    assert _remembered(path, 900.0, lambda: full) == full
    assert _remembered(path, 100.0, never) == full


def test_a_report_is_read_as_it_was_written() -> None:
    probes = (Probe(64, 8, 16, 3.0, 4.0), Probe(256, 8, 16, 5.0, 6.0))
    report = ProbeReport(1.0, 2.0, {True: probes, False: probes[:1]}, inf, complete=True)
    assert _from_fields(json.loads(json.dumps(_to_json(report)))) == report


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"probes": [{"checkpointing": 1}]}', "7"])
def test_what_is_damaged_is_measured_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(damage)
    report = ProbeReport(1.0, 2.0, {}, inf, complete=True)
    assert _remembered(path, 500.0, lambda: report) == report
    assert _from_fields(json.loads(path.read_text())) == report


def test_threads_that_there_was_no_memory_to_try_are_not_remembered(tmp_path: Path) -> None:
    base = BaseModelInfo(name="base-tiny", sha256="0" * 64, parameters=1, modules=SHAPES)
    found = choose_threads(
        base_tiny.PATH,
        base,
        dtype="f32",
        most=7,
        scale=2.0,
        cache=tmp_path,
        limit_mib=100.0,
        process=ProbingProcess(100.0),
    )
    assert found == 7
    assert not list(tmp_path.glob("*.json"))


def test_no_memory_without_a_kill_is_told_as_a_kill_is() -> None:
    def refused(**_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    worker = cast("Any", SimpleNamespace(train=refused))
    assert _answer(worker, ("train", {})).crash == OUT_OF_MEMORY


def test_what_checkpointed_tokens_keep_counts_beyond_the_probes() -> None:
    way = Way("f32", True)
    flat = [Probe(tokens, 8, 16, WEIGHTS + 50.0, 1.0) for tokens in (64, 256, 512)]
    found = fit(flat, SHAPES, WEIGHTS, way)
    grown = found.beside_mib(4608) - found.beside_mib(512)
    assert grown == pytest.approx(4096 * (128 + 4 * 64) * 4 / (1 << 20))
    plain = fit(flat, SHAPES, WEIGHTS, Way("f32", False))
    assert plain.kept_mib == 0
