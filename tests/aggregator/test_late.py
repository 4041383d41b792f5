"""An update that comes after its round, where the job takes some: counted once, and discounted."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from aggregator.config import build_job
from aggregator.errors import ConfigError
from aggregator.merging import merge_round
from aggregator.retention import tidy
from aggregator.rounds import Policy, RoundState
from aggregator.updates import upload_directions
from aggregator.versions import Versions
from protocol.adapter import Adapter, Factors
from protocol.faults import VARIABLE
from protocol.messages import UploadManifest, upload_id
from protocol.tensors import encode
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import DEVICE, Aggregator, make_job, update
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
JOB = make_job(rounds=2, ladder=[2, 4], rule_settings={"staleness": True})


# -- a real aggregator and broker, killed or not ------------------------------------------------


@pytest.mark.parametrize("point", ["", "aggregator.upload.settling", "aggregator.upload.kept"])
def test_what_missed_its_round_counts_once_in_the_next(
    tmp_path: Path, mosquitto: BrokerAddress, point: str
) -> None:
    file = tmp_path / "job.json"
    policy = {"min_devices": 2, "deadline_s": 3, "late_updates": 1}
    file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
    arguments = ["serve", file, "--state", tmp_path / "state", "--broker", mosquitto]
    arguments += ["--json", "--exit-when-done"]

    with ExitStack() as stack:

        def serve(point: str = "") -> Program:
            environment = {VARIABLE: point} if point else {}
            made = Program("aggregator", arguments, tmp_path, "aggregator", environment=environment)
            return stack.enter_context(made)

        lives = [serve()]
        lives[0].wait_for("serving")
        slow, quick = (
            LightDevice(mosquitto, tmp_path / name, name, JOB, lambda now: 1e-3)
            for name in ("slow", "quick")
        )
        for device in (slow, quick):
            stack.callback(device.close)
        run_until(lambda: bool(slow.trained), slow)
        run_until(lambda: bool(lives[0].of("merged")), quick)
        lives[0].end(signal.SIGKILL)
        policy |= {"quorum": 2}  # round 2 waits for both, however long that takes here
        file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
        if point:
            lives.append(serve(point))
            run_until(lambda: lives[1].process.poll() is not None, slow)
            assert lives[1].wait() == -signal.SIGKILL, lives[1].stderr
        lives.append(serve())
        run_until(lambda: lives[-1].process.poll() is not None, slow, quick)
        assert lives[-1].wait() == 0, lives[-1].stderr
    merged = {e["round"]: e["weights"] for life in lives for e in life.of("merged")}
    assert merged[1] == {"quick": 1.0}
    assert merged[2] == pytest.approx({"slow": 0.5 / np.sqrt(2), "quick": 0.5})
    counted = {(e["device"], e["behind"]) for life in lives for e in life.of("counted")}
    assert counted <= {("quick", 0), ("slow", 1)}, "one may be killed before it is said"
    with closing(sqlite3.connect(tmp_path / "state" / "store.sqlite")) as db:
        rows = db.execute("SELECT device, round, state FROM uploads ORDER BY round, device")
        assert rows.fetchall() == [
            ("quick", 1, "counted"), ("slow", 1, "counted"), ("quick", 2, "counted"),
        ]  # fmt: skip


# -- the aggregator -----------------------------------------------------------------------------


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    job = make_job(rule="flexlora", rule_settings={"staleness": True})
    made = Aggregator(tmp_path / "state", job, Policy(late_updates=2))
    made.greet()
    yield made
    made.store.close()


def go_on(a: Aggregator, number: int) -> None:
    """Do as if a round had been merged: its version is the one before, and a bit."""
    versions = Versions(a.job, a.store)
    layers = {
        n: Factors(f.a, f.b + np.float32(0.01 * number))
        for n, f in versions.load(number).layers.items()
    }
    version = number + 1
    moved = versions.write(Adapter(layers, a.job.scale), version=version, parent=number)
    after = RoundState(version, "open", version, None)
    a.store.finish_round(
        after, moved, number=number, seconds=0.0, weights={}, residual=0.0, late_updates=2
    )


def trained(a: Aggregator, number: int, size: float) -> tuple[UploadManifest, bytes]:
    data = encode(update(a.job, size), "f32")
    upload = upload_id(DEVICE, "notes", number)
    return a.manifest(data, round=number, version=number, upload=upload), data


def test_it_is_put_over_the_version_it_started_from(aggregator: Aggregator) -> None:
    a = aggregator
    manifest, data = trained(a, 1, 0.01)
    go_on(a, 1)
    go_on(a, 2)
    (answer,) = a.deliver(manifest, data)
    assert answer.kind == "done"
    now = a.store.round()
    assert a.store.uploads.of_round(3, "counted") == [manifest]
    assert a.store.uploads.of_round(1, "counted") == []
    tidy(a.store, 10)  # its file is needed
    versions = Versions(a.job, a.store)
    merged = merge_round(a.job, a.store, versions, now).merged
    assert merged.weights == pytest.approx({DEVICE: 3**-0.5})
    first, previous = versions.load(1), versions.load(3)
    tensors = update(a.job, 0.01)
    for name, before in first.layers.items():
        at = upload_directions(a.job, manifest)[name]
        d_out, d_in = a.job.base.modules[name]
        own_a, own_b = before.a.astype(np.float64), before.b.astype(np.float64)
        own_a[at] += tensors[f"A.{len(at)}x{d_in}"][0]
        own_b[:, at] += tensors[f"B.{d_out}x{len(at)}"][0]
        own = a.job.scale * own_b @ own_a
        held = previous.layers[name]
        shared = a.job.scale * held.b.astype(np.float64) @ held.a.astype(np.float64)
        wanted = shared + (own - shared) / np.sqrt(3)
        u, s, vt = np.linalg.svd(wanted, full_matrices=False)
        r = held.rank
        best = (u[:, :r] * s[:r]) @ vt[:r]
        result = merged.adapter.layers[name]
        ours = a.job.scale * result.b.astype(np.float64) @ result.a
        assert np.linalg.norm(ours - best) < 1e-4 * np.linalg.norm(best)


def test_it_counts_once_whatever_is_said_again(aggregator: Aggregator) -> None:
    a = aggregator
    first, data = trained(a, 1, 0.01)
    go_on(a, 1)
    assert a.deliver(first, data)[-1].kind == "done"
    assert a.offer(first)[0].kind == "done"
    second, more = trained(a, 2, 0.02)
    assert a.deliver(second, more)[-1].kind == "done", "one of a device counts in a round"
    assert a.store.uploads.of_round(2, "counted") == [first]
    go_on(a, 2)
    assert a.offer(first)[0].kind == "done"
    assert a.offer(second)[0].kind == "done"
    assert a.store.uploads.of_round(3, "counted") == []


def test_two_late_ones_of_a_device_do_not_count_in_one_round(aggregator: Aggregator) -> None:
    a = aggregator
    first, second = trained(a, 1, 0.01), trained(a, 2, 0.02)
    go_on(a, 1)
    go_on(a, 2)
    assert a.deliver(*first)[-1].kind == "done"
    (answer,) = a.deliver(*second)
    assert (answer.kind, answer.reason) == (
        "reject", "another update of this device counts in round 3 already",
    )  # fmt: skip
    with pytest.raises(sqlite3.IntegrityError):
        a.store.uploads.count(second[0], late_for=3)


def test_what_is_on_its_way_at_the_end_of_its_round_goes_on(aggregator: Aggregator) -> None:
    a = aggregator
    manifest, data = trained(a, 1, 0.01)
    half = a.offer(manifest)[0].chunks[0]
    a.chunk(manifest, half, data[: 128 << 10])
    go_on(a, 1)
    (need,) = a.offer(manifest)
    assert half not in need.chunks
    assert a.deliver(manifest, data)[-1].kind == "done"
    assert a.store.uploads.of_round(2, "counted") == [manifest]


@pytest.mark.parametrize(
    ("rounds", "changed", "said"),
    [
        (3, {}, "round 1 is over (it is round 4, open)"),
        (2, {"version": 2}, "it starts from version 2, the round from 1"),
        (2, {}, "version 1, from which it starts, is not kept any more"),
    ],
)
def test_what_is_too_late_is_refused_with_a_reason(
    aggregator: Aggregator, rounds: int, changed: dict[str, int], said: str
) -> None:
    a = aggregator
    manifest, data = trained(a, 1, 0.01)
    for number in range(1, rounds + 1):
        go_on(a, number)
    if not changed:
        a.store.forget_versions(2)
    (answer,) = a.deliver(manifest.model_copy(update=changed), data)
    assert (answer.kind, answer.reason) == ("reject", said)


def test_the_versions_that_late_updates_start_from_must_be_kept() -> None:
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": [8, 6]}}
    fields = {"job": "notes", "base": base, "policy": {"late_updates": 3, "keep_versions": 3}}
    with pytest.raises(ConfigError, match="late_updates = 3 needs keep_versions = 4 at least"):
        build_job(fields, "job.toml")
    fields["policy"] = {"late_updates": 3, "keep_versions": 4}
    assert build_job(fields, "job.toml")[1].late_updates == 3
