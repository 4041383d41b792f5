"""Buffered rounds: merged every K updates, whatever version each started from; each counts once."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.config import PolicySettings, build_job
from aggregator.errors import ConfigError
from aggregator.merging import merge_round
from aggregator.retention import tidy
from aggregator.rounds import Answers, Policy, RoundState, next_action
from aggregator.updates import upload_directions
from aggregator.versions import Versions
from aggregator.view import StateView
from protocol.adapter import Adapter, Factors
from protocol.faults import VARIABLE
from protocol.messages import Job, UploadManifest, upload_id
from protocol.tensors import encode
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import DEVICE, Aggregator, make_job, update
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
BUFFERED = Policy(buffer=2, max_staleness=2)


# -- when a buffered round is merged ------------------------------------------------------------


def action(online: str, trained: str, buffered: int, **policy: Any) -> str | None:
    return next_action(
        RoundState(4, "open", 4, 100.0),
        Policy(**{"buffer": 3, "quorum": 2, **policy}),
        job="notes",
        rounds=9,
        time_s=policy.get("deadline_s", 0.0),
        online=set(online),
        delivered=set(trained),
        buffered=buffered,
    )


def test_it_is_merged_when_the_buffer_is_full_whoever_else_is_at_work() -> None:
    assert action("abcdef", "a", 2) is None
    assert action("abcdef", "a", 3) == "merge"
    assert action("abcdef", "", 5) == "merge", "updates of older versions fill it as well"


def test_a_buffer_larger_than_the_fleet_waits_for_nobody_who_has_delivered() -> None:
    assert action("ab", "a", 2) is None, "b may yet deliver from this version"
    assert action("ab", "ab", 2) == "merge"
    assert action("ab", "ab", 1) == "merge"
    assert action("a", "a", 1) is None, "there is no quorum, and nobody else to ask"


def test_at_the_deadline_it_is_merged_with_a_quorum_and_else_extended() -> None:
    assert action("abcdef", "a", 2, deadline_s=100.0) == "merge"
    assert action("abcdef", "a", 1, deadline_s=100.0) == "extend"


def test_who_has_delivered_from_an_older_version_may_deliver_again() -> None:
    answers = Answers(4)
    answers.add(UploadManifest.model_construct(device="a", round=3, upload="a-3"))
    answers.add(UploadManifest.model_construct(device="b", round=4, upload="b-4"))
    answers.add(UploadManifest.model_construct(device="b", round=3, upload="b-3"))
    assert answers.delivered(BUFFERED) == {"b"}
    assert answers.delivered(Policy(late_updates=2)) == {"a", "b"}
    assert len(answers.updates) == 3


# -- the job file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"mode": "buffered"}, 'mode = "buffered" needs buffer'),
        ({"buffer": 3}, 'buffer needs mode = "buffered"'),
        ({"max_staleness": 3}, 'max_staleness needs mode = "buffered"'),
        ({"mode": "buffered", "buffer": 3, "late_updates": 1}, "late_updates is of synchronous"),
        ({"mode": "buffered", "buffer": 3, "quorum": 4}, "quorum = 4 is more than buffer = 3"),
        (
            {"mode": "buffered", "buffer": 3, "keep_versions": 8},
            "max_staleness = 8 needs keep_versions = 9 at least",
        ),
        ({"mode": "buffered", "buffer": 0}, "buffer"),
        ({"mode": "sometimes", "buffer": 3}, "mode"),
    ],
)
def test_a_policy_that_can_not_be_is_refused(policy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_job({**FIELDS, "policy": policy}, "job.toml")


BASE = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": [8, 6]}}
FIELDS = {"job": "notes", "base": BASE}


def test_a_buffered_policy_is_read() -> None:
    policy = {"mode": "buffered", "buffer": 3, "max_staleness": 4, "keep_versions": 5}
    assert build_job({**FIELDS, "policy": policy}, "job.toml")[1] == Policy(
        buffer=3, max_staleness=4, keep_versions=5
    )


@pytest.mark.parametrize("policy", [Policy(), Policy(late_updates=2), BUFFERED])
def test_a_policy_makes_the_settings_that_make_it(policy: Policy) -> None:
    assert PolicySettings.model_validate(PolicySettings.of(policy)).policy() == policy


def test_personal_adapters_need_rounds_that_begin_together() -> None:
    policy = {"mode": "buffered", "buffer": 3}
    with pytest.raises(ConfigError, match=r'needs policy\.mode = "synchronous"'):
        build_job({**FIELDS, "rule": "trust-weights", "policy": policy}, "job.toml")


# -- the aggregator -----------------------------------------------------------------------------


@pytest.fixture(params=["anchored"])
def aggregator(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path / "state", make_job(rule=request.param), BUFFERED)
    made.greet()
    yield made
    made.store.close()


def go_on(a: Aggregator, number: int) -> None:
    """Do as if a round had been merged: its version is the one before, moved and turned."""
    versions = Versions(a.job, a.store)
    layers = {
        n: Factors(-f.a[::-1], np.float32(0.01 * number) - f.b[:, ::-1])
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


def product(factors: Factors, scale: float) -> np.ndarray:
    return scale * factors.b.astype(np.float64) @ factors.a.astype(np.float64)


@pytest.mark.parametrize("aggregator", ["anchored", "flexlora", "fedavg"], indirect=True)
def test_what_it_moved_is_added_to_todays_version_with_a_discount(aggregator: Aggregator) -> None:
    """ΔW⁺ = ΔW_g + (1+τ)^−½·Δ_k: what others have moved meanwhile stays where it is."""
    a = aggregator
    go_on(a, 1)
    manifest, data = trained(a, 2, 0.01)
    go_on(a, 2)
    go_on(a, 3)
    (answer,) = a.deliver(manifest, data)
    assert answer.kind == "done"
    now = a.store.round()
    assert a.store.uploads.of_round(4, "counted") == [manifest]
    assert a.store.uploads.of_round(2, "counted") == []
    tidy(a.store, 3)  # the file and the version that it builds on are needed
    versions = Versions(a.job, a.store)
    merged = merge_round(a.job, a.store, versions, now, buffered=True).merged
    assert merged.weights == pytest.approx({DEVICE: 3**-0.5})
    started, previous = versions.load(2), versions.load(4)
    tensors = update(a.job, 0.01)
    for name, before in started.layers.items():
        at = upload_directions(a.job, manifest)[name]
        d_out, d_in = a.job.base.modules[name]
        after = Factors(before.a.astype(np.float64), before.b.astype(np.float64))
        after.a[at] += tensors[f"A.{len(at)}x{d_in}"][0]
        after.b[:, at] += tensors[f"B.{d_out}x{len(at)}"][0]
        moved = product(after, a.job.scale) - product(before, a.job.scale)
        wanted = product(previous.layers[name], a.job.scale) + moved / np.sqrt(3)
        u, s, vt = np.linalg.svd(wanted, full_matrices=False)
        r = before.rank
        best = (u[:, :r] * s[:r]) @ vt[:r]
        ours = product(merged.adapter.layers[name], a.job.scale)
        assert np.linalg.norm(ours - best) < 1e-4 * np.linalg.norm(best)
        assert np.linalg.norm(moved) > 1e-2 * np.linalg.norm(best), "or it would not matter"


@pytest.mark.parametrize("rule", ["anchored", "hetlora", "segment", "geomed"])
def test_every_built_in_rule_takes_changes_beside_todays_version(tmp_path: Path, rule: str) -> None:
    a = Aggregator(tmp_path / "state", make_job(rule=rule), BUFFERED)
    a.greet()
    first = trained(a, 1, 0.01)
    go_on(a, 1)
    second = trained(a, 2, 0.01)
    for manifest, data in (first, second):
        assert a.deliver(manifest, data)[-1].kind == "done"
    assert a.store.uploads.of_round(2, "counted") == [first[0], second[0]]
    merged = merge_round(a.job, a.store, Versions(a.job, a.store), a.store.round(), buffered=True)
    assert 0.5 < merged.merged.weights[DEVICE] < 1, "one is fresh, one is discounted"
    assert all(np.isfinite(f.b).all() for f in merged.merged.adapter.layers.values())
    a.store.close()


def test_two_of_a_device_count_in_one_buffer_and_each_once(aggregator: Aggregator) -> None:
    a = aggregator
    first, second, third = (trained(a, number, 0.01 * number) for number in (1, 2, 3))
    go_on(a, 1)
    go_on(a, 2)
    for manifest, data in (first, second, third):
        assert a.deliver(manifest, data)[-1].kind == "done"
        assert [answer.kind for answer in a.offer(manifest)] == ["done"]
    in_it = a.store.uploads.of_round(3, "counted")
    assert [m.round for m in in_it] == [1, 2, 3]
    go_on(a, 3)
    for manifest, _ in (first, second, third):
        assert [answer.kind for answer in a.offer(manifest)] == ["done"]
    assert a.store.uploads.of_round(4, "counted") == []
    with pytest.raises(sqlite3.IntegrityError):
        a.store.uploads.count(first[0], late_for=4, buffered=True)


def test_what_was_left_for_an_older_version_does_not_count_late(aggregator: Aggregator) -> None:
    a = aggregator
    manifest, data = trained(a, 1, 0.01)
    versions = Versions(a.job, a.store)
    again = versions.write(versions.load(1), version=2, parent=1)
    ended = a.store.round()
    after = RoundState(2, "open", 2, None)
    a.store.begin_anew(after, again, ended=ended, note="rolled back to version 1")
    (answer,) = a.deliver(manifest, data)
    assert (answer.kind, answer.reason) == (
        "reject", "what round 1 began from has been left for an older version",
    )  # fmt: skip
    assert a.store.uploads.of_round(2, "counted") == []


def test_a_view_tells_updates_in_the_buffer_and_who_may_deliver_again(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    a = aggregator
    a.store.set_policy(Policy(buffer=5, max_staleness=2))
    first, second, third = (trained(a, number, 0.01) for number in (1, 2, 3))
    go_on(a, 1)
    go_on(a, 2)
    with StateView(a.folder) as view:
        for manifest, data in (first, second):
            a.deliver(manifest, data)
        assert view.job().waiting_for.startswith("updates: 2 of a buffer of 5")
        assert "has delivered" not in view.devices()[0].waiting_for
        assert "has delivered for round 3" not in view.crowd().reasons
        a.deliver(*third)
        assert view.job().waiting_for.startswith("updates: 3 of a buffer of 5")
        assert view.devices()[0].waiting_for == "has delivered for round 3"
        assert "has delivered for round 3" in view.crowd().reasons
        newest = view.rounds()[0]
        assert (newest.number, newest.counted) == (3, 3)


def test_what_is_further_behind_is_refused_with_a_reason(aggregator: Aggregator) -> None:
    a = aggregator
    manifest, data = trained(a, 1, 0.01)
    for number in (1, 2, 3):
        go_on(a, number)
    (answer,) = a.deliver(manifest, data)
    assert (answer.kind, answer.reason) == (
        "reject", "it is 3 versions behind, and an update counts up to 2 behind",
    )  # fmt: skip
    assert a.store.devices.strike(DEVICE, 1, 1.0), "this is the first strike: it was no fault"


# -- a real aggregator and broker, killed or not ------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [
        "",
        "aggregator.upload.settling",
        "aggregator.upload.kept",
        "aggregator.merge.before",
        "aggregator.round.settling",
        "aggregator.round.committed",
    ],
)
def test_every_update_counts_once_whatever_version_it_is_of(
    tmp_path: Path, mosquitto: BrokerAddress, point: str
) -> None:
    job = make_job(rounds=3, ladder=[2, 4])
    file = write_job(tmp_path, job, {"mode": "buffered", "buffer": 2, "min_devices": 3})
    arguments = ["serve", file, "--state", tmp_path / "state", "--broker", mosquitto]
    arguments += ["--json", "--exit-when-done"]

    with ExitStack() as stack:

        def serve(point: str = "") -> Program:
            environment = {VARIABLE: point} if point else {}
            made = Program("aggregator", arguments, tmp_path, "aggregator", environment=environment)
            return stack.enter_context(made)

        lives = [serve()]
        lives[0].wait_for("serving")
        slow, one, two = (
            LightDevice(mosquitto, tmp_path / name, name, job, lambda now: 1e-3)
            for name in ("slow", "one", "two")
        )
        for device in (slow, one, two):
            stack.callback(device.close)
        run_until(lambda: bool(slow.trained), slow)  # and has not offered it
        run_until(lambda: len(lives[0].of("merged")) == 2, one, two)
        lives[0].end(signal.SIGKILL)
        if point:
            lives.append(serve(point))
            run_until(lambda: lives[1].process.poll() is not None, slow)
            assert lives[1].wait() == -signal.SIGKILL, lives[1].stderr
        lives.append(serve())
        run_until(lambda: lives[-1].process.poll() is not None, slow)
        assert lives[-1].wait() == 0, lives[-1].stderr
    assert slow.trained == [(1, 0), (3, 0)], "what is behind is delivered, then the newest trained"
    merged = {e["round"]: e["weights"] for life in lives for e in life.of("merged")}
    both = {"one": 0.5, "two": 0.5}
    assert merged[1] == both and merged[2] == both
    if 3 in merged:  # one may be killed before it is said
        assert merged[3] == pytest.approx({"slow": 0.5 + 0.5 / np.sqrt(3)})
    with closing(sqlite3.connect(tmp_path / "state" / "store.sqlite")) as db:
        rows = db.execute("SELECT device, round, state FROM uploads ORDER BY round, device")
        assert rows.fetchall() == [
            ("one", 1, "counted"), ("slow", 1, "counted"), ("two", 1, "counted"),
            ("one", 2, "counted"), ("two", 2, "counted"), ("slow", 3, "counted"),
        ]  # fmt: skip
        weights = dict(db.execute("SELECT number, weights FROM rounds"))
    assert json.loads(weights[3]) == pytest.approx({"slow": 0.5 + 0.5 / np.sqrt(3)})


def write_job(folder: Path, job: Job, policy: dict[str, Any]) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps({**job.model_dump(), "policy": policy}))
    return file
