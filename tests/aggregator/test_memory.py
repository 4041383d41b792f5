"""What a rule carries from round to round: kept over crashes, and the same as without them."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from aggregator.errors import StoreError
from aggregator.memory import read_memory, write_memory
from aggregator.merge import Memory
from aggregator.retention import tidy
from aggregator.rounds import RoundState
from aggregator.store import Store
from protocol.adapter import Adapter, Factors
from protocol.faults import VARIABLE
from protocol.messages import GlobalManifest, Round, describe_file
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import make_job
from tests.conftest import running_mosquitto
from tests.faults.processes import Program

POINTS = (
    "aggregator.merge.before",
    "aggregator.merge.after",
    "aggregator.version.written",
    "file.written:3",  # the momentum, after two bands
    "file.synced:4",  # the residue
    "file.renamed:4",
    "aggregator.memory.written",
    "aggregator.round.settling",
    "aggregator.round.committed",
    "aggregator.round.announced:2",
)
SETTINGS = {"momentum": 0.5, "error_feedback": True, "memory_rank": 3}
JOB = make_job(rounds=len(POINTS) + 2, ladder=[2, 4], rule_settings=SETTINGS)


def size_of(name: str, now: Round) -> float:
    """Another update in each round, the same in each run."""
    digest = hashlib.sha256(f"{name}|{now.number}".encode()).digest()
    return (digest[0] - 128) * 1e-3


def merged_job(folder: Path, points: tuple[str, ...]) -> dict[str, bytes]:
    """Run the whole job, its aggregator killed at each point in turn; return all versions."""
    folder.mkdir()
    file = folder / "job.json"
    policy = {"min_devices": 2, "quorum": 2, "keep_versions": 0}
    file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
    with ExitStack() as stack:
        broker = stack.enter_context(running_mosquitto(folder / "broker"))
        devices = []
        for name in ("desk", "kitchen"):
            made = LightDevice(
                broker, folder / name, name, JOB, lambda now, name=name: size_of(name, now)
            )
            stack.callback(made.close)
            devices.append(made)
        for point in (*points, ""):
            arguments = ["serve", file, "--state", folder / "state", "--broker", broker, "--json"]
            life = Program(
                "aggregator", [*arguments, "--exit-when-done"], folder, "aggregator",
                environment={VARIABLE: point} if point else {},
            )  # fmt: skip
            with life:
                run_until(lambda life=life: life.process.poll() is not None, *devices)
                status = life.wait()
            assert status == (-signal.SIGKILL if point else 0), f"{point}: {life.stderr}"
    state = folder / "state"
    kept = sorted(path.name for path in (state / "memory").iterdir())
    last = JOB.rounds + 1
    assert kept == [f"{last}.momentum.safetensors", f"{last}.residue.safetensors"]
    store = Store(state)
    carried = read_memory(store)
    store.close()
    for adapter in (carried.momentum, carried.residue):
        assert adapter is not None
        assert any(f.b.any() for f in adapter.layers.values()), "there is something to lose"
    files = sorted((state / "versions").glob("*/*"))
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in files}


@pytest.mark.timeout(240)
def test_a_crash_anywhere_merges_what_none_would_have(tmp_path: Path) -> None:
    undisturbed = merged_job(tmp_path / "undisturbed", ())
    killed = merged_job(tmp_path / "killed", POINTS)
    assert len(undisturbed) == 2 * (JOB.rounds + 1)
    assert killed == undisturbed


# -- the parts ----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.close()


def drawn(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        f"m.{rank}": Factors(
            rng.standard_normal((rank, 5)).astype(np.float32),
            rng.standard_normal((7, rank)).astype(np.float32),
        )
        for rank in (1, 3)
    }
    return Adapter(layers, 0.5)


def hand_on(store: Store, memory: Memory, version: int) -> None:
    data = describe_file(b"")
    manifest = GlobalManifest(
        job="notes", version=version, parent=None, encoding="f32", bands={"0-2": data}
    )
    store.finish_round(
        RoundState(version, "open", version, None),
        manifest,
        number=version - 1,
        seconds=0.0,
        weights={},
        residual=0.0,
        carried=write_memory(store, memory, version=version),
    )


def same(one: Adapter | None, other: Adapter | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.scale == other.scale and all(
        np.array_equal(f.a, other.layers[n].a) and np.array_equal(f.b, other.layers[n].b)
        for n, f in one.layers.items()
    )


@pytest.mark.parametrize(
    "memory", [Memory(), Memory(drawn(0)), Memory(None, drawn(1)), Memory(drawn(0), drawn(1))]
)
def test_what_is_handed_on_is_read_back(store: Store, memory: Memory) -> None:
    assert read_memory(store) == Memory()
    hand_on(store, memory, 2)
    found = read_memory(store)
    assert same(found.momentum, memory.momentum)
    assert same(found.residue, memory.residue)


def test_what_is_not_committed_changes_nothing(store: Store) -> None:
    hand_on(store, Memory(drawn(0)), 2)
    write_memory(store, Memory(drawn(1), drawn(1)), version=3)
    assert same(read_memory(store).momentum, drawn(0))
    tidy(store, 10)
    assert [path.name for path in store.memory_folder.iterdir()] == ["2.momentum.safetensors"]
    assert same(read_memory(store).momentum, drawn(0))


@pytest.mark.parametrize("spoil", ["cut", "gone"])
def test_a_spoilt_file_is_named(store: Store, spoil: str) -> None:
    hand_on(store, Memory(drawn(0)), 2)
    (file,) = store.memory_folder.iterdir()
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"2\.momentum\.safetensors, which the next round needs"):
        read_memory(store)
