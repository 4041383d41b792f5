"""Where modules are merged can't be told from the result: in this process, elsewhere, or on Ray."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from aggregator.config import check_settings
from aggregator.engine import Engine, InProcess, open_engine
from aggregator.errors import ConfigError, EngineError, MergeError
from aggregator.merge import Memory, Merged, RoundView, Update, merge
from aggregator.merge.round_view import rebased
from aggregator.merging import check_engine, merge_round
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.versions import Versions
from protocol.adapter import Adapter, Factors, LazyLayers
from protocol.broker import free_port
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.merge.made_rounds import draw
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
T = TypeVar("T")
R = TypeVar("R")
SHAPES = {"q": (40, 30), "k": (3, 30), "up": (90, 70)}
RANK = 8
RULES: list[tuple[str, dict[str, Any]]] = [
    ("anchored", {"momentum": 0.5, "error_feedback": True, "staleness": True}),
    ("fedavg", {}),
    ("hetlora", {"clip": "median"}),
    ("segment", {}),
    ("geomed", {}),
    ("flora", {"split": "left"}),
]


class Elsewhere(InProcess):
    """Work in no other process, but on what another would get."""

    def map(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        for piece in pieces:
            yield pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(work))(reread(piece))))


def reread(piece: T) -> T:
    again: T = pickle.loads(pickle.dumps(piece))
    return again


def made_round(seed: int = 0, size: float = 1.0) -> RoundView:
    """Return a round of unequal ranks, one of them behind, read when it is asked for."""
    rng = np.random.default_rng(seed)
    held = {name: min(RANK, *shape) for name, shape in SHAPES.items()}
    older, previous = (
        Adapter({n: draw(rng, shape, held[n]) for n, shape in SHAPES.items()}, 2.0) for _ in "12"
    )
    updates = []
    for k, rank in enumerate((2, 8, 4)):
        at = {n: np.arange(min(rank, held[n])) for n in SHAPES}
        layers = {n: draw(rng, shape, len(at[n])) for n, shape in SHAPES.items()}
        layers = {n: Factors(f.a, size * f.b) for n, f in layers.items()}
        lazy = LazyLayers(tuple(SHAPES), lambda name, layers=layers: layers[name])  # type: ignore[misc]
        updates.append(Update(f"d{k}", Adapter(lazy, 1.0), at, 10 + k, {}))
    updates[1] = rebased(updates[1], older, previous)
    momentum = Adapter({n: draw(rng, shape, held[n]) for n, shape in SHAPES.items()}, 2.0)
    return RoundView(previous, updates, SHAPES, RANK, seed, Memory(momentum=momentum))


def numbers(merged: Merged) -> dict[str, np.ndarray]:
    """Return all arrays of a result by what they are."""
    found = {"adapter": merged.adapter}
    for kind in ("momentum", "residue"):
        if (carried := getattr(merged.memory, kind)) is not None:
            found[kind] = carried
    return {
        f"{kind} {name} {side}": getattr(factors, side)
        for kind, adapter in found.items()
        for name, factors in adapter.layers.items()
        for side in "ab"
    }


def assert_same(engine: Engine) -> None:
    for rule, settings in RULES:
        view = made_round()
        plain = merge(rule, view, settings=settings)
        other = merge(rule, view, settings=settings, engine=engine)
        assert (other.weights, other.residual) == (plain.weights, pytest.approx(plain.residual))
        ours, theirs = numbers(plain), numbers(other)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            distance = np.linalg.norm(theirs[name] - array)
            assert distance <= 1e-5 * np.linalg.norm(array), f"{rule} {name}"
            assert theirs[name].dtype == array.dtype


def test_a_piece_of_a_merge_carries_all_that_it_takes() -> None:
    assert_same(Elsewhere())


def test_an_error_of_a_merge_is_the_same_after_a_journey() -> None:
    error = MergeError("it has NaN", device="d1", module="q")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.device, again.module) == (str(error), "d1", "q")


def test_an_engine_that_has_nothing_to_do_is_refused() -> None:
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": [8, 6]}}
    job, _ = check_settings({"job": "notes", "base": base, "rule": "trust-weights"}, "job.toml")
    check_engine(job, "plain")
    with pytest.raises(ConfigError, match="--engine ray shares out the modules"):
        check_engine(job, "ray")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"engine ray needs an extra.*\[ray\]"):
        open_engine("ray")


def test_a_cluster_at_whose_address_nobody_listens_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(EngineError, match=f"no Ray cluster answers at {address} .RAY_ADDRESS"):
            open_engine("ray")


# -- Ray ----------------------------------------------------------------------------------------


def test_ray_merges_to_the_same_adapter(no_cluster: None) -> None:
    """In a process of its own: Ray warns of much, and leaves threads and files behind."""
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    program = "from tests.aggregator.test_engine import check_on_ray; check_on_ray()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all as it should be" in done.stdout


def check_on_ray() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with open_engine("ray") as engine:
        assert signal.getsignal(signal.SIGTERM) is before, "what ends this process is its own"
        assert_same(engine)
        with pytest.raises(MergeError, match="module up: the merged values are too large"):
            merge("flexlora", made_round(size=1e38), settings={"split": "left"}, engine=engine)
        with pytest.raises(EngineError, match="can't do its part"):
            list(engine.map(work_that_is_not_there, [1]))
    print("all as it should be")


def work_that_is_not_there(piece: int) -> int:
    raise ModuleNotFoundError(f"No module named 'piece{piece}'")


def test_a_served_job_merges_on_ray(
    tmp_path: Path, mosquitto: BrokerAddress, no_cluster: None
) -> None:
    """A real aggregator with a cluster of its own: its last version is what a merge here makes."""
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    plain = {"momentum": 0.0}  # so that a round can be merged again by itself
    job = make_job(rounds=2, ladder=[2, 4], encoding_down="f32", rule_settings=plain)
    file, state = tmp_path / "job.json", tmp_path / "state"
    file.write_text(json.dumps({**job.model_dump(), "policy": {"min_devices": 2, "quorum": 2}}))
    arguments = ["serve", file, "--state", state, "--broker", mosquitto, "--engine", "ray"]
    with ExitStack() as stack:
        program = Program(
            "aggregator", [*arguments, "--json", "--exit-when-done"], tmp_path, "aggregator"
        )
        stack.enter_context(program)
        program.wait_for("serving")
        devices = [
            LightDevice(mosquitto, tmp_path / name, name, job, lambda now: 1e-2)
            for name in ("one", "two")
        ]
        for device in devices:
            stack.callback(device.close)
        run_until(lambda: program.process.poll() is not None, *devices)
        assert program.wait() == 0, program.stderr
    assert len(program.of("merged")) == 2
    store = Store(state)
    versions = Versions(job, store)
    again = merge_round(job, store, versions, RoundState(2, "open", 2, None)).merged.adapter
    for name, factors in versions.load(3).layers.items():
        for theirs, ours in ((factors.a, again.layers[name].a), (factors.b, again.layers[name].b)):
            assert np.linalg.norm(theirs - ours) <= 1e-5 * np.linalg.norm(ours)
    store.close()
