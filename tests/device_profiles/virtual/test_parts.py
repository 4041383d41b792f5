"""Parts of a replay by themselves: the order of events, training in time, who is what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from device_profiles.errors import ReplayError
from device_profiles.traces.format import Trace
from device_profiles.traces.sample import Sample
from device_profiles.virtual.drive import Drive
from device_profiles.virtual.fleet import cast, parse_fidelities
from device_profiles.virtual.learning import Timed
from device_profiles.virtual.options import parse_speed
from device_profiles.virtual.pool import FILE, Pool
from device_profiles.virtual.schedule import Schedule
from edge_client.errors import TrainingPaused
from edge_client.learning import Place
from edge_client.plan import Plan
from protocol.adapter import Adapter
from protocol.loop_link import Loop
from protocol.messages import BaseModelInfo
from tests.aggregator.uploading import make_job
from tests.device_profiles.virtual.made_pool import LADDER

PLAN = Plan(4, 4, 1, 64, False, "f32", 1, 40.0, 100.0)
HELD = Adapter({}, 1.0)
PLACE = Place(round_number=1, attempt=0, drawn_rows=0)


def test_events_come_in_the_order_of_time_then_device_then_their_own() -> None:
    schedule, seen = Schedule(), []

    def note(name: str) -> Any:
        return lambda time_s: seen.append((time_s, name))

    schedule.at(2.0, 1, note("late"))
    schedule.at(1.0, 7, note("seven"))
    schedule.at(1.0, 3, note("three"))
    schedule.at(1.0, 3, note("three again"))
    assert schedule.next_s == 1.0
    while (event := schedule.take(1.5)) is not None:
        event.action(event.time_s)
    assert [name for _, name in seen] == ["three", "three again", "seven"]
    assert schedule.take(1.5) is None and schedule.next_s == 2.0


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Return a drive of one device that is always settled, whose aggregator asks for nothing."""
    where = {"deadline": None, "said": "", "action": None}
    aggregator = SimpleNamespace(stands=where, step=lambda time_s: where, settle=lambda n: {})
    device = SimpleNamespace(
        settings=SimpleNamespace(name="kitchen"),
        index=0,
        is_settled=True,
        is_online=False,
        is_connecting=False,
    )
    loop = Loop()
    yield Drive(loop, Schedule(), aggregator, [device], epoch_s=0.0, resolution_s=1.0)  # type: ignore[arg-type, list-item]
    loop.close()


def test_what_is_due_a_rounding_error_after_an_instant_is_done_in_it(drive: Drive) -> None:
    seen: list[float] = []
    for due in (33.0, math.nextafter(33, 34), math.nextafter(66, 67), 66.5):
        drive._schedule.at(due, 0, seen.append)
    while drive.instant():
        assert drive.instants <= 4, "it goes on"
    assert len(seen) == 4 and drive.now_s == 67.0


def test_a_device_that_is_connecting_goes_on_when_it_is_in(drive: Drive) -> None:
    device: Any = drive._devices[0]
    seen: list[str] = []

    def connect(_: float) -> None:
        seen.append("connects")
        device.is_connecting, device.is_settled = True, False

    def let_in() -> bool:
        seen.append("is let in" if device.is_connecting else "settles")
        device.is_connecting, device.is_settled = False, True
        return True

    drive._schedule.at(0.2, 0, connect)
    drive._schedule.at(0.7, 0, lambda _: seen.append("does what is to be done"))
    drive._devices_settled = let_in  # type: ignore[method-assign]
    assert drive.instant() and not drive.instant()
    assert [what for what in seen if what != "settles"] == [
        "connects",
        "is let in",
        "does what is to be done",
    ]


class Inner:
    """A learner that only counts."""

    text, trained, plan = None, 0, PLAN

    def begin(self, *_: object) -> None:
        pass

    def train(self, *_: object) -> str:
        self.trained += 1
        return "learned"

    def use(self, plan: Plan) -> None:
        self.plan = plan

    def stop(self) -> None:
        pass


class Device:
    """A clock, and a speed."""

    def __init__(self) -> None:
        self.now, self.speed, self.used = 0.0, 10.0, 0.0
        self.inner: Any = Inner()
        self.timed = Timed(
            self.inner, PLAN, lambda before, why: Plan(2, 2, 1, 64, False, "f32", 1, 20.0, 100.0),
            steps=10, step_tokens=100, tokens_s=lambda: self.speed, now=lambda: self.now,
            used=self.use,
        )  # fmt: skip

    def use(self, seconds: float) -> None:
        self.used += seconds

    def train(self) -> object:
        return self.timed.train(HELD, 4, PLACE, lambda *_: None)


def test_a_training_takes_its_time_and_is_real_only_then() -> None:
    device = Device()
    with pytest.raises(TrainingPaused) as paused:
        device.train()
    assert paused.value.steps == 0 and device.timed.ends_s == 100.0
    device.now = 50.0
    device.timed.account()
    device.speed = 5.0  # throttled
    device.now = 60.0  # at the old speed until it is looked at
    device.timed.account()
    assert device.timed.ends_s == 60.0 + 400 / 5
    device.now = device.timed.ends_s
    assert device.train() == "learned" and device.inner.trained == 1
    assert device.used == pytest.approx(140.0) and not device.timed.is_under_way


def test_a_pause_loses_the_step_that_is_under_way() -> None:
    device = Device()
    with pytest.raises(TrainingPaused):
        device.train()
    device.now = 25.0
    device.timed.stop()
    assert device.timed.is_under_way and not device.timed.runs
    device.now = 1000.0
    with pytest.raises(TrainingPaused) as paused:
        device.train()
    assert paused.value.steps == 2, "two of ten were whole"
    assert device.timed.ends_s == 1080.0


def test_a_killed_training_begins_anew_with_a_smaller_plan() -> None:
    device = Device()
    with pytest.raises(TrainingPaused):
        device.train()
    device.now = 90.0
    device.timed.kill("no memory")
    assert device.timed.killed == 1 and device.inner.plan.rank == 2
    with pytest.raises(TrainingPaused):
        device.train()
    assert device.timed.ends_s == 190.0


def test_fidelities() -> None:
    assert parse_fidelities("", 5) == {"recorded": 5}
    assert parse_fidelities("headless=2, train=1", 5) == {"train": 1, "recorded": 2, "headless": 2}
    for wrong in ("train", "train=x", "trained=1", "train=1,train=2", "train=6"):
        with pytest.raises(ReplayError, match="--fidelity"):
            parse_fidelities(wrong, 5)


def test_a_cast_is_the_same_for_the_same_seed() -> None:
    traces = [Trace(name, None, None, None, [Sample(0.0), Sample(100.0)]) for name in "abc"]
    own = cast(traces, 3, 1, {"train": 1, "recorded": 2})
    assert [(p.trace.name, p.offset_s) for p in own] == [("a", 0.0), ("b", 0.0), ("c", 0.0)]
    assert [p.name for p in own] == ["train-00000", "recorded-00001", "recorded-00002"]
    many = cast(traces, 50, 1, {"recorded": 50})
    assert many == cast(traces, 50, 1, {"recorded": 50}) != cast(traces, 50, 2, {"recorded": 50})
    assert len({p.offset_s for p in many}) == 50 and all(0 <= p.offset_s < 100 for p in many)


def test_speeds() -> None:
    assert parse_speed("max") == 0.0 and parse_speed("3600") == 3600.0
    for wrong in ("0", "-1", "inf", "nan", "fast"):
        with pytest.raises(ReplayError, match="--speed"):
            parse_speed(wrong)


def test_a_pool_that_is_damaged_or_of_another_job(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, kept = made
    described = BaseModelInfo.model_validate_json(base.read_bytes())
    job = make_job(base=described, ladder=LADDER)
    pool = Pool(kept, job)
    update = pool.update(3, "kitchen", 1)
    assert update.change.rank == 4, "the smallest that has as many"
    assert pool.update(4, "desk", 1).change.layers.keys() == update.change.layers.keys()
    name = next(iter(described.modules))
    one, other = (pool.update(4, d, 1).change.layers[name].a for d in ("kitchen", "desk"))
    assert (one != other).any() and (one == update.change.layers[name].a).all()
    with pytest.raises(ReplayError, match="lacks rank 16"):
        Pool(kept, make_job(base=described, ladder=[2, 16]))
    with pytest.raises(ReplayError, match=r"another base or version|of another job"):
        Pool(kept, make_job(ladder=LADDER))
    copy = tmp_path / "pool"
    copy.mkdir()
    for file in kept.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "rank-4.safetensors").write_bytes(b"x")
    with pytest.raises(ReplayError, match="rank 4 is damaged"):
        Pool(copy, job)
    (copy / FILE).write_text("{}")
    with pytest.raises(ReplayError, match="is damaged"):
        Pool(copy, job)
    with pytest.raises(ReplayError, match="can't read the pool"):
        Pool(tmp_path / "none", job)
