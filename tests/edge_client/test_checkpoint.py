"""A training that pauses, or is killed, goes on as if it never had."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import base_tiny
from edge_client.data.pack import StreamState
from edge_client.errors import TrainingDiverged, TrainingPaused, WorkerKilled
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.checkpoint import FILE, Checkpoints, Keeping, NotKept, forget, identity_of
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.worker import Text
from protocol.adapter import Adapter, Factors, initial_adapter
from protocol.messages import Pruning, Training

PLAN = Plan(4, 8, 1, 64, False, "f32", 1, 10.0, 100.0)
STEPS = 6
SETTINGS = Training(steps=STEPS, tokens_per_step=128, max_tokens=64, warmup_steps=2)
Outcome = tuple[dict[int, float], Adapter, TrainReport]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"page {n}: " + f"said {n * n} times. " * 20 for n in range(40)))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Adapter]:
    from edge_client.model import describe_model

    whole = initial_adapter(describe_model("base-tiny").modules, 8, 2.0, seed=0)
    rest = Adapter({n: f.take(slice(4, None)) for n, f in whole.layers.items()}, 2.0)
    return whole.truncated(4), rest


@contextmanager
def opened(text: Path, plan: Plan = PLAN) -> Iterator[TrainingProcess]:
    with TrainingProcess() as process:
        process.call("open", model=base_tiny.PATH, text=Text((text,), 0), plan=plan)
        yield process


def train(
    process: TrainingProcess,
    adapters: tuple[Adapter, Adapter],
    keeping: Keeping | None,
    losses: dict[int, float],
    after: Callable[[int], bool] = lambda step: False,
    settings: Training = SETTINGS,
) -> Outcome:
    """Train, noting losses by step; `after` a step says whether to pause."""

    def on_progress(value: Any) -> bool:
        step, loss = value
        assert step not in losses, "no step is done twice"
        losses[step] = loss
        return after(step)

    process.call("load", trained=adapters[0], frozen=adapters[1])
    adapter, report = process.call(
        "train",
        stream="fleet",
        settings=settings,
        learning_rate=2e-3,
        pruning=Pruning(),
        sampling=True,
        keeping=keeping,
        on_progress=on_progress,
    )
    return losses, adapter, report


def same(one: Outcome, other: Outcome) -> None:
    assert one[0].keys() == other[0].keys()
    for step, loss in one[0].items():
        assert loss == pytest.approx(other[0][step], abs=1e-5)
    for name, factors in one[1].layers.items():
        np.testing.assert_allclose(factors.a, other[1].layers[name].a, atol=1e-6)
        np.testing.assert_allclose(factors.b, other[1].layers[name].b, atol=1e-6)
    assert replace(one[2], seconds=0) == replace(other[2], seconds=0)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, optimizer="adafactor")], ids=str)
def test_paused_and_killed_training_comes_to_the_same(
    tmp_path: Path, text: Path, adapters: tuple[Adapter, Adapter], plan: Plan
) -> None:
    keeping = Keeping(tmp_path / FILE, "mine", every_s=0.0)
    with opened(text, plan) as process:
        whole = train(process, adapters, None, {})
        assert not keeping.path.exists()
    assert whole[0].keys() == set(range(1, STEPS + 1))

    paused: dict[int, float] = {}
    with opened(text, plan) as process:
        for pause in (2, 4):
            with pytest.raises(TrainingPaused) as stopped:
                train(process, adapters, keeping, paused, lambda step, at=pause: step == at)
            assert (stopped.value.steps, stopped.value.unkept) == (pause, "")
            assert max(paused) == pause, "it pauses before the next step"
        process.call("load", trained=None, frozen=adapters[0])
        process.call("evaluate", split="held_out")  # what is done meanwhile changes nothing
        same(train(process, adapters, keeping, paused), whole)

    keeping.path.unlink()
    killed: dict[int, float] = {}
    with opened(text, plan) as process:

        def kill(step: int) -> bool:
            if step == 4:  # its loss is heard, and what it did is not kept
                os.kill(process._process.pid or 0, signal.SIGKILL)
            return False

        with pytest.raises(WorkerKilled):
            train(process, adapters, keeping, killed, kill)
    with safe_open(keeping.path, framework="np") as file:
        assert "mine" in file.metadata()["training"]
    assert keeping.path.stat().st_mode & 0o777 <= 0o644
    del killed[4]
    with opened(text, plan) as process:
        same(train(process, adapters, keeping, killed), whole)


def test_what_is_kept_of_another_training_is_taken_away(
    tmp_path: Path, text: Path, adapters: tuple[Adapter, Adapter]
) -> None:
    keeping = Keeping(tmp_path / FILE, "mine", every_s=1e9)
    short = SETTINGS.model_copy(update={"steps": 2})

    def pause(process: TrainingProcess) -> None:
        with pytest.raises(TrainingPaused):
            train(process, adapters, keeping, {}, lambda step: step == 1)
        assert keeping.path.exists()

    def begins_anew(
        process: TrainingProcess, keeping: Keeping, given: tuple[Adapter, Adapter] = adapters
    ) -> None:
        losses, _, _ = train(process, given, keeping, {}, settings=short)
        assert losses.keys() == {1, 2}
        assert not keeping.path.exists()

    with opened(text) as process:
        pause(process)
        begins_anew(process, replace(keeping, identity="another"))
        pause(process)
        keeping.path.write_bytes(keeping.path.read_bytes()[:-1000])
        begins_anew(process, keeping)
        pause(process)
        _damage(keeping.path)
        begins_anew(process, keeping)
        pause(process)
        begins_anew(process, keeping, (adapters[0].truncated(2), adapters[1]))  # other shapes
        # A full disk pauses all the same.
        nowhere = replace(keeping, path=tmp_path / "there is no such folder" / FILE)
        with pytest.raises(TrainingPaused) as stopped:
            train(process, adapters, nowhere, {}, lambda step: step == 2)
        assert stopped.value.unkept and "is lost" in str(stopped.value)
        pause(process)
    text.write_text(text.read_text() + "\n\none page more, " * 40)
    with opened(text) as process:
        begins_anew(process, keeping)


def _damage(path: Path) -> None:
    """Write over the middle of a file, as a bad card does: its header is still right."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1000] = b"\xff" * 1000
    path.write_bytes(data)


def test_a_training_that_diverges_ends_there_and_leaves_nothing(
    tmp_path: Path, text: Path, adapters: tuple[Adapter, Adapter]
) -> None:
    keeping = Keeping(tmp_path / FILE, "mine", every_s=0.0)
    losses: dict[int, float] = {}
    broken = Adapter(
        {n: Factors(f.a, np.full_like(f.b, np.nan)) for n, f in adapters[0].layers.items()},
        adapters[0].scale,
    )
    with opened(text) as process:
        with pytest.raises(TrainingPaused):
            train(process, adapters, keeping, {}, lambda step: step == 2)
        assert keeping.path.exists()
        keeping = replace(keeping, identity="broken")
        with pytest.raises(TrainingDiverged, match=r"in step 1: its loss is nan; .*0\.002"):
            train(process, (broken, adapters[1]), keeping, losses)
        assert not losses and not list(tmp_path.glob(f"{FILE}*"))
        losses, _, _ = train(process, adapters, keeping, {})
        assert losses.keys() == set(range(1, STEPS + 1)), "the process goes on"


class _Made:
    """A training's state, made up."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = np.array(numbers, np.float32)

    def arrays(self) -> dict[str, Any]:
        return {"factor.0": self._numbers, "steps": np.array(1)}

    def restore(self, arrays: Any) -> bool:
        return True


def test_what_is_not_finite_is_never_written(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path / FILE, "mine", every_s=0.0)
    between = Checkpoints(keeping, None, _nowhere, lambda: True, None, lambda _: None)
    with pytest.raises(TrainingDiverged, match="step 2"):
        between.after_step(_Made(1.0, np.inf), [4.0, 5.0], 10)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_said_once(tmp_path: Path) -> None:
    told: list[NotKept] = []
    keeping = Keeping(tmp_path / "gone" / FILE, "mine", every_s=0.0)
    between = Checkpoints(keeping, None, _nowhere, lambda: False, None, told.append)
    for _ in range(3):
        between.after_step(_Made(1.0), [4.0], 10)
    assert len(told) == 1 and "o such file" in told[0].why


def test_what_a_cut_left_half_written_goes_too(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.tmp").write_bytes(b"half")
    forget(tmp_path)
    assert not list(tmp_path.iterdir())


def _nowhere() -> StreamState:
    return StreamState(seed=0, drawn_rows=0, fingerprint=0)


def test_identity_is_of_all_that_the_outcome_follows_from(
    adapters: tuple[Adapter, Adapter],
) -> None:
    what: dict[str, object] = {"job": {"job": "notes"}, "place": (3, 0)}
    first = identity_of(PLAN, *adapters, what)
    assert first == identity_of(replace(PLAN, predicted_mib=1.0, threads=3), *adapters, what)
    others = [
        identity_of(replace(PLAN, rank=2), *adapters, what),
        identity_of(PLAN, adapters[0], None, what),
        identity_of(PLAN, adapters[1], adapters[0], what),
        identity_of(PLAN, *adapters, {**what, "place": (3, 1)}),
        identity_of(PLAN, *adapters, {**what, "place": (4, 0)}),
        identity_of(PLAN, *adapters, {**what, "job": {"job": "letters"}}),
    ]
    assert len({first, *others}) == 7
