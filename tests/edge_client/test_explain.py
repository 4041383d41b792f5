"""`edge-client plan`: which other plans are shown, what is said of them, and of wrong input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_profiles.schema import Accelerator, load_profile
from edge_client import show_plan
from edge_client.errors import ConfigError, NoPlanFits
from edge_client.explain import alternatives, on_accelerators, why
from edge_client.plan import fits
from edge_client.planned_job import planned_job
from edge_client.prepare import Planning
from edge_client.show import show_profile
from edge_client.show_plan import _as_dict, _print
from edge_client.wanted import Wanted
from tests.edge_client.test_plan import CALIBRATION, LADDER, SHAPES, TRAINING

NPU = Accelerator(kind="npu", name="Rockchip NPU", shares_system_memory=True)
GPU = Accelerator(kind="gpu", name="NVIDIA GPU", shares_system_memory=False)


def planned(budget_mib: float, blocks: int = 0) -> Planning:
    wanted = Wanted(SHAPES, LADDER, 64, TRAINING, blocks=blocks)
    return Planning(wanted, CALIBRATION, budget_mib, threads=4)


@pytest.mark.parametrize("budget", [670, 720, 900, 4000])
def test_the_chosen_one_leads_what_is_shown_and_what_does_not_fit_ends_it(budget: float) -> None:
    found = planned(budget)
    best = found.best()
    told = alternatives(best, found.every(best.seq_len), 64)
    assert told[0] == best
    assert {plan.rank for plan in told} == set(LADDER)
    assert len(told) == len(set(told)) <= 12
    fitting = [fits(plan) for plan in told]
    assert fitting == sorted(fitting, reverse=True)
    sizes = best.rank, best.held, best.optimizer
    like = {plan.way for plan in told if (plan.rank, plan.held, plan.optimizer) == sizes}
    assert len(like) == 4


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (660, "so they are cut to"),
        (720, "the largest rank of the job (64) fits; with Adam's moments it would be rank"),
        (676, "of the shared adapter's 64 directions can be held, and rank"),
        (10_000, "the largest rank of the job (64) fits; 30 plans of that rank fit (by"),
    ],
)
def test_one_sentence_says_why(budget: float, said: str) -> None:
    found = planned(budget)
    best = found.best()
    sentence = why(best, found, found.every(best.seq_len))
    assert said in sentence
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0
    assert sentence[0].isupper() or sentence[0].isdigit()


def test_an_npu_is_for_inference_and_shares_the_budget_where_it_shares_memory() -> None:
    (npu,) = on_accelerators([NPU, NPU])
    assert "can run an exported model (inference); can't train" in npu
    assert "counts against the same budget" in npu
    (gpu,) = on_accelerators([GPU])
    assert "not used" in gpu
    assert "budget" not in gpu
    assert on_accelerators([]) == ["No accelerator was found; training runs on the CPU."]


@pytest.mark.parametrize("budget", [670, 4000])
def test_all_that_is_printed_is_readable_at_80_columns(
    budget: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = planned(budget)
    best = found.best()
    profile = load_profile("laptop-16gb").model_copy(update={"accelerators": (NPU, GPU)})
    every = found.every(best.seq_len)
    _print(best, found, every, why(best, found, every), profile, explain=True)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "…" not in printed
    assert "→" in printed
    assert "exported model" in printed
    left = len(every) - len(alternatives(best, every, 64))
    assert f"{left} more plans of this length are left out" in " ".join(printed.split())


def test_brackets_in_what_is_told_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(900)
    best = replace(found.best(), why_backend="pip install '.[edge]'")
    profile = load_profile("raspberry-pi-5-8gb")
    _print(best, found, [], "Built of [bold] words.", profile, explain=True)
    printed = capsys.readouterr().out
    assert "Built of [bold] words." in printed and "pip install '.[edge]'" in printed
    show_profile(profile.model_copy(update={"board_or_model": "board [8086:7d55] [red]"}))
    assert "board [8086:7d55] [red]" in capsys.readouterr().out


def test_the_json_has_every_plan_and_what_each_accelerator_is_for() -> None:
    found = planned(900)
    best = found.best()
    every = found.every(best.seq_len)
    profile = load_profile("laptop-16gb").model_copy(update={"accelerators": (NPU, NPU, GPU)})
    told = json.loads(json.dumps(_as_dict(best, found, every, "because", profile)))
    assert told["plan"]["rank"] == best.rank
    assert len(told["candidates"]) == len(every)
    assert any(not plan["fits"] for plan in told["candidates"])
    assert ["inference" in one["here"] for one in told["accelerators"]] == [True, False]


def test_a_job_file_gives_what_a_plan_depends_on(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    text = 'job = "notes"\nmodel = "base-tiny"\nladder = [2, 8]\nremainder = "dropped"\n'
    text += 'directions = "top"\n[training]\nmax_tokens = 128\nsteps = 3\n[policy]\nquorum = 2\n'
    file.write_text(text)
    job, base = planned_job(file, "", {"max_tokens": 64})
    assert (job.ladder, job.remainder, base) == ([2, 8], "dropped", "base-tiny")
    assert (job.training.max_tokens, job.training.steps) == (64, 3)
    assert job.base.name == "base-tiny"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.toml", None, "there is no such file"),
        ("bad.toml", "rounds = 3\njob = ", "line 2 (job =) is not TOML"),
        ("bad.json", "[1", "line 1 ([1) is not JSON"),
        ("list.json", "[1]", "is not an object with settings"),
        ("flat.toml", "training = 3", "training: must be a table of settings"),
        ("wrong.toml", "ladder = [4, 2]", "ladder must be ascending"),
        ("kind.toml", 'ladder = "4"', 'ladder: must be a list, not "4"'),
        ("field.toml", "[training]\nmax_tokens = 3", "training.max_tokens: must be at least 16"),
        ("word.toml", '[training]\nsteps = "x"', "training.steps: must be a whole number, not"),
        ("name.toml", 'job = "My Notes"', "job: must be 1 to 63 small letters"),
        ("spelt.toml", 'modle = "x"', "no setting 'modle'; did you mean 'model'?"),
        ("inner.toml", "[training]\nstep = 5", "did you mean 'training.steps'?"),
        ("moved.toml", "max_tokens = 64", "did you mean 'training.max_tokens'?"),
        ("far.toml", "[pruning]\nxyz = 5", "there are enabled, gamma, penalty, rank_min"),
        ("number.toml", "model = 3", "model: must be text, not 3"),
        ("model.toml", 'model = "gone.json"', "model description gone.json"),
    ],
)
def test_a_wrong_job_file_is_said_in_one_line(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        planned_job(tmp_path / name, "", {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_file_may_begin_as_some_editors_have_it(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b'\xef\xbb\xbfjob = "notes"\n[policy]\nquorum = 2\n')
    assert planned_job(tmp_path / "job.toml", "", {})[0].job == "notes"


def test_no_plan_at_all_is_said_in_one_line() -> None:
    with pytest.raises(NoPlanFits) as caught:
        planned(500).best()
    assert "\n" not in str(caught.value)


def test_what_is_measured_for_long_is_said_beside_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*_: object) -> Planning:
        time.sleep(0.5)
        return planned(4000)

    monkeypatch.setattr(show_plan, "planning", slow)
    monkeypatch.setattr(show_plan, "block_choices", lambda *_: [0])
    monkeypatch.setattr(show_plan, "SILENT_S", 0.05)
    nothing: Any = None
    assert show_plan._choose_with(nothing, nothing, Path(), "torch")[0] is not None
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "measuring how this device trains the model with torch: minutes" in printed.err
