"""What the state folder and the broker keep of a job that has gone on for a while."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.export import export_adapter
from aggregator.retention import tidy
from aggregator.rounds import RoundState
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.chunks import split
from protocol.tensors import encode
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import Aggregator, make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
JOB = make_job(rounds=5, ladder=[2, 4])


# -- a real job, to its end and over a crash ----------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kept_versions(broker: BrokerAddress) -> set[int]:
    """Return the versions of which the broker keeps anything."""
    link = MqttTransport(broker, "test-kept", temporary=True)
    link.connect()
    link.subscribe([f"tunefleet/1/{JOB.job}/#"])
    link.publish("tunefleet/1/notes/echo", b"")
    found = set()
    while (incoming := link.receive(10.0)) and incoming.topic != "tunefleet/1/notes/echo":
        if incoming.payload and "/global/" in incoming.topic:
            found.add(int(topics.match(incoming.topic).fields["version"]))
    link.close()
    return found


@pytest.mark.parametrize("policy", [{}, {"keep_versions": 2}, {"keep_versions": 0}], ids=str)
def test_what_is_left_of_a_job(
    tmp_path: Path, mosquitto: BrokerAddress, policy: dict[str, Any]
) -> None:
    file, state = tmp_path / "job.json", tmp_path / "state"
    file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
    arguments = ["serve", file, "--state", state, "--broker", mosquitto, "--json"]
    size = iter(np.linspace(1e-4, 1e-3, 50))
    with ExitStack() as stack:

        def serve() -> Program:
            made = Program("aggregator", [*arguments, "--exit-when-done"], tmp_path, "aggregator")
            stack.enter_context(made).wait_for("serving")
            return made

        aggregator = serve()
        kitchen = LightDevice(mosquitto, tmp_path / "kitchen", "kitchen", JOB, lambda _: next(size))
        stack.callback(kitchen.close)
        run_until(lambda: bool(aggregator.of("merged")), kitchen)
        aggregator.end(signal.SIGKILL)
        # As after a crash between a file and its commit.
        (state / "versions" / "77").mkdir()
        (state / "versions" / "77" / "0-2.safetensors").write_bytes(b"half")
        (state / "updates" / f"{'0' * 64}.safetensors.tmp").write_bytes(b"half")
        second = serve()
        run_until(lambda: second.process.poll() is not None, kitchen)
        assert second.wait() == 0, second.stderr
    merged = [e["round"] for one in (aggregator, second) for e in one.of("merged")]
    assert merged == [1, 2, 3, 4, 5]
    assert len(names(state / "updates")) == 1, "of the last merged round"
    kept = [5, 6] if policy.get("keep_versions") == 2 else [1, 2, 3, 4, 5, 6]
    assert names(state / "versions") == [str(version) for version in kept]
    assert kept_versions(mosquitto) == {5, 6}
    assert export_adapter(state, tmp_path / "adapter", version=kept[0]).version == kept[0]


# -- the parts ----------------------------------------------------------------------------------


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path / "state", make_job(base=SMALL, ladder=[2, 4]))
    made.greet()
    yield made
    made.store.close()


SMALL = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": (70_000, 4)}}


def merged(aggregator: Aggregator, number: int) -> None:
    """Do as if a round had been merged and the next one opened."""
    store, version = aggregator.store, number + 1
    versions = Versions(aggregator.job, store)
    manifest = versions.write(first_version(aggregator.job), version=version, parent=number)
    after = RoundState(number + 1, "open", version, None)
    store.finish_round(after, manifest, number=number, seconds=0.0, weights={}, residual=0.0)


def delivered(aggregator: Aggregator, number: int, size: float) -> Path:
    data = encode({"A.2x4": np.zeros((1, 2, 4)), "B.70000x2": np.full((1, 70_000, 2), size)}, "f32")
    fields = {"round": number, "version": number, "rank": 2, "rank_trained": 2, "held": 4}
    manifest = aggregator.manifest(data, **fields)
    (answer,) = aggregator.deliver(manifest, data)
    assert answer.kind == "done", answer.reason
    return aggregator.store.uploads.file(manifest)


def test_updates_go_when_the_next_round_is_merged(aggregator: Aggregator) -> None:
    store = aggregator.store
    same = delivered(aggregator, 1, 1e-3)
    merged(aggregator, 1)
    second = delivered(aggregator, 2, 2e-3)
    tidy(store, 10)
    assert set(store.uploads.folder.iterdir()) == {same, second}, "round 1 was merged last"
    merged(aggregator, 2)
    assert delivered(aggregator, 3, 1e-3) == same, "the same content as in round 1"
    tidy(store, 10)
    assert set(store.uploads.folder.iterdir()) == {same, second}
    merged(aggregator, 3)
    tidy(store, 10)
    tidy(store, 10)
    assert set(store.uploads.folder.iterdir()) == {same}
    assert store.uploads.has_counted("phone-1", 2), "that it has counted is not forgotten"


def test_the_newest_versions_stay(aggregator: Aggregator) -> None:
    store = aggregator.store
    for number in range(1, 6):
        merged(aggregator, number)
    tidy(store, 0)
    assert store.version_numbers() == {"1", "2", "3", "4", "5", "6"}
    store.forget_versions(3)
    aggregator.reopen()  # as after a crash between the commit and the files
    tidy(aggregator.store, 3)
    assert names(aggregator.store.versions_folder) == ["4", "5", "6"]
    assert aggregator.store.version(4) is not None and aggregator.store.version(3) is None


def test_chunks_that_came_too_late_go(aggregator: Aggregator) -> None:
    data = encode({"A.2x4": np.zeros((1, 2, 4)), "B.70000x2": np.zeros((1, 70_000, 2))}, "f32")
    manifest = aggregator.manifest(data, rank=2, rank_trained=2, held=4)
    chunks = split(data)
    aggregator.offer(manifest)
    aggregator.chunk(manifest, 0, chunks[0])
    merged(aggregator, 1)
    assert len(aggregator.store.uploads.missing_chunks(manifest)) == len(chunks)
    assert aggregator.chunk(manifest, 1, chunks[1]) == []
    (answer,) = aggregator.offer(manifest)
    assert answer.kind == "reject" and "is over" in answer.reason
