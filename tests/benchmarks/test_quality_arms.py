"""Every kind of arm runs on a small fleet, and leaves the base as it was."""

import random
from pathlib import Path

import pytest
import torch

from base_tiny import PATH
from benchmarks.quality import demo
from benchmarks.quality.arms import ADDED, ARMS, DEFAULT, FITS, LARGEST, Schedule
from benchmarks.quality.full_weights import FullWeights
from benchmarks.quality.store import Case
from benchmarks.simulation import Setting, SimulatedDevice, Simulation
from edge_client.data import Example, Splits

SCHEDULE = Schedule(rounds=2, steps=2, tokens_per_step=64, max_tokens=32)
WORDS = ("loop", "table", "mail", "socket", "future", "parser", "codec")


def text(seed: int, count: int) -> list[Example]:
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS, k=12)) for _ in range(count))
    return [Example("text", line, Path("made"), n) for n, line in enumerate(lines)]


@pytest.fixture(scope="module")
def fleet() -> Simulation:
    devices = [
        SimulatedDevice(f"d{n}", rank, 16, Splits(text(n, 20), text(10 + n, 3), text(20 + n, 3)))
        for n, rank in enumerate((2, 8, 4))
    ]
    return Simulation(PATH, devices, seed=0, setting=Setting(32, 2))


@pytest.mark.parametrize(
    "arm",
    [
        "local only",
        "hetlora",
        DEFAULT,
        LARGEST,
        "full weights averaged",
        "trust-weights",
        "trust-predictions",
        "trust-validation and private",
        "shared and private",
    ],
)
def test_an_arm_learns_and_leaves_the_base_alone(fleet, arm):
    before = fleet.losses(None)
    result = ARMS[arm].run(fleet, SCHEDULE, 4e-3)
    assert result.held_out < before[1]
    assert set(result.devices) == {"d0", "d1", "d2"}
    assert len(result.curve) == SCHEDULE.rounds
    assert fleet.losses(None) == before


@pytest.mark.parametrize("name", ADDED)
def test_what_is_off_by_default_changes_what_comes_of_a_fleet(fleet, name):
    with_it, without = (ARMS[arm].run(fleet, SCHEDULE, 4e-3) for arm in (f"{FITS}, {name}", FITS))
    assert with_it.held_out != without.held_out


def test_where_full_weights_are_averaged_all_of_them_learn(fleet):
    control = FullWeights(fleet)
    before = {name: p.detach().clone() for name, p in control._parameters.items()}
    control.run(ARMS["full weights averaged"].whole_job(fleet, SCHEDULE, 4e-3), lambda _: None)
    still = [name for name, p in control._parameters.items() if torch.equal(p, before[name])]
    assert not still


def test_a_result_is_read_back_only_for_the_same_run(tmp_path, monkeypatch, fleet):
    monkeypatch.setattr("benchmarks.quality.store.RUNS", tmp_path)
    case = Case("made", "base-tiny", "base", 0, 1e-3, SCHEDULE)
    assert case.read() is None
    result = ARMS["base"].run(fleet, SCHEDULE, 1e-3)
    case.write(result)
    assert case.read() == result
    assert Case("made", "base-tiny", "base", 0, 1e-3, Schedule()).read() is None
    assert Case("made", "base-tiny", "base", 1, 1e-3, SCHEDULE).read() is None


@pytest.mark.timeout(900)  # five arms of ten rounds of rank 64
def test_each_arm_of_the_demo_gives_two_losses(fleet, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_TRAINING", {"steps": 1, "tokens_per_step": 32})
    for arm in demo.arms(fleet).values():
        trust, held_out = arm(2e-3)
        assert 0 < trust < 20
        assert 0 < held_out < 20
