"""A Flower user gets our rules and ranks: in Flower's simulation, the same adapter as over MQTT.

Flower can't share an environment with the tests' other libraries, so `make flower` makes it one,
once, without torch; where it is not there these tests are skipped and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.memory import write_memory
from aggregator.merging import merge_round
from aggregator.rounds import RoundState
from aggregator.versions import Versions
from edge_client.learning import learn
from edge_client.trainer.base import TrainReport
from edge_client.update import make_update
from protocol import topics
from protocol.adapter import Adapter
from protocol.chunks import split
from protocol.messages import Round, UploadManifest
from tests.aggregator.uploading import Aggregator
from tests.flower.fleet import RANKS, ROUNDS, RULES, MadeUpLearner, made_job

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-flower"


@pytest.fixture(scope="session")
def flower() -> Path:
    """Return the Python of the environment with Flower."""
    if not (VENV / "complete").exists():
        pytest.skip("Flower is not installed: make flower (Python 3.11 or later)")
    return VENV / "bin" / "python"


@pytest.fixture(scope="session")
def simulated(
    flower: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Run the fleet in Flower's simulation; return adapters and what was told, by rule."""
    out = tmp_path_factory.mktemp("flower") / "found.npz"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [flower, "-m", "tests.flower.fleet", out],
        cwd=ROOT,
        env={**environment, **quiet, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as found:
        return dict(found), json.loads(out.with_suffix(".json").read_text())


def plain(folder: Path, rule: str) -> tuple[Adapter, list[dict[str, float]], list[float]]:
    """Run the same fleet through intake, store and merge; return adapter, weights and losses."""
    job = made_job(rule)
    a = Aggregator(folder, job)
    versions = Versions(job, a.store)
    learners = {f"node-{number}": MadeUpLearner(number) for number in range(len(RANKS))}
    ranks, drawn = {n: one.rank for n, one in learners.items()}, dict.fromkeys(learners, 0)
    weights, losses = [], []
    for name in learners:
        a.greet(name)
    for number in range(1, ROUNDS + 1):
        shared = versions.load(number)
        now = Round(job=rule, number=number, state="open", version=number)
        for name, one in learners.items():

            def train(
                received: Adapter,
                frozen: Adapter | None,
                one: Any = one,
                place: tuple[int, int] = (number, drawn[name]),
            ) -> tuple[Adapter, TrainReport]:
                number, rows = place
                return one.train(job, received, frozen, round_number=number, drawn_rows=rows)

            learned = learn(job, name, shared, ranks[name], number, train)
            loss = one.evaluate(shared)
            manifest, data = make_update(job, now, name, learned, one.text, held_out_loss=loss)
            ranks[name], drawn[name] = learned.rank, learned.report.drawn_rows
            deliver(a, manifest, data)
        state = RoundState(number, "open", number, None)
        assert len(a.store.uploads.of_round(number, "counted")) == len(RANKS)
        merged = merge_round(job, a.store, versions, state).merged
        version = versions.write(merged.adapter, version=number + 1, parent=number)
        a.store.finish_round(
            RoundState(number + 1, "open", number + 1, None),
            version,
            number=number,
            seconds=0.0,
            weights=merged.weights,
            residual=merged.residual,
            carried=write_memory(a.store, merged.memory, version=number + 1),
        )
        weights.append(merged.weights)
        found = versions.load(number + 1)
        losses.append(float(np.mean([one.evaluate(found) for one in learners.values()])))
    a.store.close()
    return found, weights, losses


def deliver(a: Aggregator, manifest: UploadManifest, data: bytes) -> None:
    """Have the intake take an upload."""
    place = {"job": manifest.job, "device": manifest.device, "upload": manifest.upload}
    topic = topics.topic("upload_manifest", **place)
    a.intake.handle(topic, a.device_key.seal(manifest, topic))
    for index, chunk in enumerate(split(data)):
        a.intake.handle(topics.topic("upload_chunk", **place, index=index), chunk)


@pytest.mark.parametrize("rule", RULES)
def test_the_adapter_is_that_of_the_plain_path(
    simulated: tuple[dict[str, np.ndarray], dict[str, Any]], tmp_path: Path, rule: str
) -> None:
    found, told = simulated
    adapter, weights, losses = plain(tmp_path / "state", rule)
    assert told[rule]["arrays"] == [1, "uint8"], "one blob"
    assert [*told[rule]["merged"].values()] == [pytest.approx(w) for w in weights]
    assert told[rule]["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] > 0.1, "it has learnt something"
    for name, factors in adapter.layers.items():
        for side, array in (("a", factors.a), ("b", factors.b)):
            distance = np.linalg.norm(found[f"{rule} {name} {side}"] - array)
            assert distance <= 1e-5 * np.linalg.norm(array)


def test_replies_that_are_not_what_they_say_are_left_out(flower: Path) -> None:
    """Run the checks of the strategy itself, in the environment that has Flower."""
    done = subprocess.run(
        [flower, "-m", "tests.flower.replies"],
        cwd=ROOT,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [
        "good",
        "other-round",
        "twice",
        "no-tensors",
        "too-large",
        "error",
    ]
