"""What trains can't be told from the result: this process, or a Ray cluster while time goes on."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import base_tiny
from aggregator.engine import InProcess, Name
from aggregator.errors import EngineError
from device_profiles import cli
from device_profiles.cli_options import EngineName
from device_profiles.errors import ReplayError
from device_profiles.virtual import benches
from device_profiles.virtual.benches import Answer, Benches, Piece, Seat
from device_profiles.virtual.broker import find_mosquitto
from device_profiles.virtual.command import run_traces
from device_profiles.virtual.learning import Timed
from device_profiles.virtual.options import Options, prepare
from device_profiles.virtual.run import replay_traces
from device_profiles.virtual.text import CarriedText
from device_profiles.virtual.training import BenchLearner
from edge_client.errors import TrainingPaused, WorkerKilled
from edge_client.learning import Place
from edge_client.model import model_hash
from edge_client.plan import Plan
from edge_client.trainer.worker import TextReport
from protocol.adapter import Adapter
from protocol.messages import BaseModelInfo
from tests.aggregator.uploading import make_job
from tests.device_profiles.virtual.made_pool import described_base, made_pool
from tests.device_profiles.virtual.test_training import JOB, TEXT, fleet_replay, result

PLAN = Plan(4, 4, 1, 64, False, "f32", 1, 40.0, 100.0)
SMALLER = replace(PLAN, rank=2)
READ = TextReport(100, 10, ())
HELD = Adapter({}, 1.0)
PLACE = Place(round_number=1, attempt=0, drawn_rows=0)


# -- a device's side ----------------------------------------------------------------------------


class Submitted:
    """Take pieces as an engine does: note which begin, and of which the result is asked for."""

    def __init__(self) -> None:
        self.begun: list[Piece] = []
        self.asked: list[Piece] = []
        self.kills = 0

    def __call__(self, piece: Piece) -> Callable[[], Answer]:
        self.begun.append(piece)

        def wait() -> Answer:
            self.asked.append(piece)
            if piece.what == "train" and self.kills:
                self.kills -= 1
                raise WorkerKilled("it was too large")
            steps = [(1, 2.5), (2, 2.25)] if piece.what == "train" else []
            value = f"learned at rank {piece.seat.plan.rank}"
            return Answer(value, steps, READ, (400.0, 10.0 * len(self.asked)))

        return wait

    def trainings(self) -> tuple[int, int]:
        """Return how many trainings have begun, and of how many the result was asked for."""
        begun, asked = ([p for p in some if p.what == "train"] for some in (self.begun, self.asked))
        return len(begun), len(asked)


class Device:
    """A learner in virtual time, whose training takes a hundred seconds."""

    def __init__(self) -> None:
        self.now_s, self.submitted = 0.0, Submitted()
        self.steps: list[tuple[int, float]] = []
        seat = Seat(make_job(), "kitchen", "base-tiny", CarriedText(Path("none")), 0, PLAN)
        self.learner = BenchLearner(self.submitted, seat, self.step_down)
        self.timed = Timed(
            self.learner, PLAN, self.step_down, steps=10, step_tokens=100, tokens_s=lambda: 10.0,
            now=lambda: self.now_s, used=lambda seconds: None,
        )  # fmt: skip

    def step_down(self, before: Plan, why: str) -> Plan:
        assert before == PLAN, "once"
        return SMALLER

    def train(self, held: Adapter = HELD) -> object:
        return self.timed.train(held, 4, PLACE, lambda *step: self.steps.append(step))


def test_a_training_is_the_engines_from_its_beginning_and_waited_for_at_its_end() -> None:
    device = Device()
    assert device.timed.text == READ
    with pytest.raises(TrainingPaused):
        device.train()
    assert device.submitted.trainings() == (1, 0), "it has begun, nobody waits"
    device.now_s = 40.0
    device.timed.stop()
    with pytest.raises(TrainingPaused):  # and goes on
        device.train()
    device.now_s = device.timed.ends_s
    assert not device.steps
    assert device.train() == "learned at rank 4"
    assert device.submitted.trainings() == (1, 1), "one training, though asked for three times"
    assert device.steps == [(1, 2.5), (2, 2.25)]
    assert device.learner.memory() == (400.0, 20.0)


def test_what_a_training_was_begun_with_is_what_it_is_taken_for() -> None:
    device = Device()
    with pytest.raises(TrainingPaused):
        device.train()
    device.now_s = 100.0
    other = Adapter({}, 2.0)
    device.train(other)
    assert device.submitted.trainings() == (2, 1)
    assert device.submitted.asked[-1].arguments["held"] is other


def test_a_training_that_virtual_time_kills_is_never_waited_for() -> None:
    device = Device()
    with pytest.raises(TrainingPaused):
        device.train()
    device.timed.kill("no memory")
    with pytest.raises(TrainingPaused):
        device.train()
    device.now_s = 100.0
    assert device.train() == "learned at rank 2"
    assert device.submitted.trainings() == (2, 1)


def test_a_training_whose_process_is_killed_is_done_by_the_next_smaller_plan() -> None:
    device = Device()
    device.submitted.kills = 1
    with pytest.raises(TrainingPaused):
        device.train()
    device.now_s = 100.0
    assert device.train() == "learned at rank 2"
    assert device.submitted.trainings() == (2, 2)
    assert device.submitted.asked[-1].arguments == device.submitted.asked[-2].arguments


# -- where it trains ----------------------------------------------------------------------------


class MadeUpBench:
    """A bench without a process, and whoever sits there."""

    text = READ

    def __init__(self) -> None:
        self.sat: list[tuple[str, int]] = []
        self.ended = False

    def seats(self, seat: Seat) -> bool:
        return self.sat[-1:] == [(seat.device, seat.plan.rank)]

    def sit(self, seat: Seat) -> MadeUpBench:
        if not self.seats(seat):
            self.sat.append((seat.device, seat.plan.rank))
        return self

    def evaluate(self, fails: bool = False) -> float:
        if fails:
            raise WorkerKilled("no memory")
        return 2.0

    def memory(self) -> tuple[float, float]:
        return 400.0, 10.0

    def end(self) -> None:
        self.ended = True


def test_benches_are_few_and_go_on_but_for_one_that_was_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[MadeUpBench] = []

    def make() -> MadeUpBench:
        made.append(MadeUpBench())
        return made[-1]

    monkeypatch.setattr(benches, "_Bench", make)
    some, job = Benches(2), make_job()

    def work(device: str, plan: Plan = PLAN, **arguments: Any) -> Answer:
        text = CarriedText(Path(device))
        seat = Seat(job, device, "base-tiny", text, 0, plan)
        return some.work(Piece(seat, "evaluate", arguments))

    for device in ("kitchen", "desk", "kitchen", "attic"):
        assert work(device).value == 2.0
    assert [bench.sat for bench in made] == [[("kitchen", 4)], [("desk", 4), ("attic", 4)]]
    work("kitchen", SMALLER)
    assert made[0].sat == [("kitchen", 4), ("kitchen", 2)]
    with pytest.raises(WorkerKilled):
        work("attic", fails=True)
    assert [bench.ended for bench in made] == [False, True]
    work("attic")
    assert len(made) == 3
    some.close()
    assert all(bench.ended for bench in made)


def test_a_machine_that_lacks_the_model_is_named(tmp_path: Path) -> None:
    for name, why in ((str(tmp_path), "has no config.json"), ("base-tiny", "is another model")):
        with pytest.raises(EngineError, match=f"{socket.gethostname()} can't train .*{why}"):
            benches._model(name, "0" * 64)


def test_text_travels_with_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    (notes / "old").mkdir(parents=True)
    (notes / "a.txt").write_text("one")
    (notes / "old" / "b.md").write_text("two")
    monkeypatch.chdir(notes / "old")
    for path in (notes, notes / "a.txt", Path("b.md"), Path(), Path("..")):
        text = CarriedText(path)
        with text.here() as here:
            assert here == path, "where it is there is nothing to carry"
        there = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(text))))
        with there.here() as here:
            assert here.name == path.absolute().resolve().name and here != path
            files = [here] if here.is_file() else here.rglob("*.*")
            read = {file.name: file.read_text() for file in files}
        assert read.items() <= {"a.txt": "one", "b.md": "two"}.items() and read
        assert not here.exists(), "nothing of it is left"


# -- a replay -----------------------------------------------------------------------------------


class Broken(InProcess):
    """An engine that has been lost."""

    def submit(self, work: object, piece: object) -> Any:
        raise EngineError("the Ray cluster is gone")


class Unreachable(InProcess):
    """One that the aggregator can't reach."""

    name: Name = "ray"
    environment = {"RAY_ADDRESS": "nobody"}  # noqa: RUF012


def one_who_trains(folder: Path) -> Options:
    """Return options of a replay with a device that trains base-tiny, and a pool beside it."""
    base = BaseModelInfo.model_validate_json(described_base(folder).read_bytes())
    base = base.model_copy(update={"sha256": model_hash(base_tiny.PATH)})
    pool = made_pool(folder / "made", base)
    job = {"base": base.model_dump(mode="json"), "rounds": 1, "policy": {"min_devices": 2}}
    return Options(
        scenario="stale-devices", devices=2, fidelity="train=1", pool=str(pool), job=job
    )  # fmt: skip


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_an_engine_that_fails_ends_the_replay_not_a_device(tmp_path: Path) -> None:
    options = one_who_trains(tmp_path)
    for number, (engine, error, why) in enumerate(
        (
            (Broken(), EngineError, "the Ray cluster is gone"),
            (Unreachable(), ReplayError, "the aggregator has ended: .*can't use Ray"),
        )
    ):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        staging, pool, _ = prepare(options, folder, tmp_path / "cache", lambda what: None)
        with pytest.raises(error, match=why):
            replay_traces(staging, folder, pool, lambda event: None, engine=engine)


def test_an_engine_that_is_not_there_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nobody")
    asked = ("run", "--scenario", "flaky-3g", "--devices", 2, "--engine", "ray")
    done = fleet_replay(tmp_path, *asked)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "can't use Ray" in said and "Traceback" not in said, said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"engine ray needs an extra.*\[ray\]"):
        run_traces(Options(scenario="flaky-3g", devices=2, engine="ray"), tmp_path, as_json=False)
    with pytest.raises(typer.BadParameter, match="are for traces"):
        cli.run(None, engine=EngineName.ray)


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_a_replay_on_ray_comes_to_the_same_adapter(tmp_path: Path, no_cluster: None) -> None:
    """Two devices train: each in tasks, beside each other; and the aggregator merges in tasks."""
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    for name in ("kitchen", "desk"):
        pages = (f"In the {name}, day {day}. {TEXT}" for day in range(60))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(pages))
    (tmp_path / "job.toml").write_text(JOB)
    options = one_who_trains(tmp_path)
    done = fleet_replay(
        tmp_path,
        *("run", "--scenario", "stale-devices", "--devices", 3, "--fidelity", "train=2"),
        *("--job", "job.toml", "--data", "kitchen.txt", "--data", "desk.txt"),
        *("--pool", options.pool, "--set", f"base={json.dumps(options.job['base'])}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plain = tmp_path / "runs" / "latest"
    done = fleet_replay(tmp_path, "again", plain.resolve(), "--engine", "ray", "--out", "on-ray")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bit for bit: {result(plain)['adapter_sha256'][:16]}" in done.stdout
    (run,) = (path for path in (tmp_path / "on-ray").iterdir() if path.is_dir())
    assert json.loads((run / "run.json").read_text())["options"]["engine"] == "ray"
    assert [each["counted"] for each in result(run)["rounds"]] == [3, 3]
