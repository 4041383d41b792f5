"""Uploads of a job whose rounds train one factor: taken at half the size, completed, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.updates import read_update, upload_stacks
from aggregator.versions import Versions
from protocol.messages import upload_id
from protocol.tensors import encode, tensor_bytes
from tests.aggregator.uploading import Aggregator, make_job, update

ALTERNATING = {"training": {"factors": "alternating"}}


@pytest.fixture
def aggregator(tmp_path: Path) -> Aggregator:
    made = Aggregator(tmp_path, make_job(**ALTERNATING))
    made.greet()
    return made


def second_round(aggregator: Aggregator) -> dict[str, object]:
    aggregator.store.set_round(RoundState(2, "open", 1, None))
    return {"round": 2, "upload": upload_id("phone-1", "notes", 2)}


@pytest.mark.parametrize("number", [1, 2])
def test_an_upload_of_the_factor_of_its_round_is_counted_and_completed(
    aggregator: Aggregator, number: int
) -> None:
    more = second_round(aggregator) if number == 2 else {}
    whole = aggregator.manifest(b"", **more)
    rng = np.random.default_rng(0)
    tensors = {
        s.name: rng.standard_normal(s.shape).astype(np.float32) / 100
        for s in upload_stacks(aggregator.job, whole)
    }
    assert {name[0] for name in tensors} == {"B" if number == 1 else "A"}
    data = encode(tensors, "f32")
    manifest = aggregator.manifest(data, **more)
    assert [a.kind for a in aggregator.deliver(manifest, data)] == ["done"]
    versions = Versions(aggregator.job, Store(aggregator.folder))
    sent = read_update(aggregator.job, versions, manifest, data)
    first = versions.load(1)
    for module, at in sent.directions.items():
        before, after = first.layers[module].take(at), sent.adapter.layers[module]
        np.testing.assert_array_equal(
            *((after.a, before.a) if number == 1 else (after.b, before.b))
        )
        moved = after.b - before.b if number == 1 else after.a - before.a
        assert np.abs(moved).max() > 0.01


def test_both_factors_in_such_a_round_are_refused(aggregator: Aggregator) -> None:
    data = encode(update(make_job()), "f32")
    (answer,) = aggregator.deliver(aggregator.manifest(data), data)
    assert answer.kind == "reject"
    assert "tensor 'A." in answer.reason
    assert "is not part of this job and rank" in answer.reason


def test_the_wrong_factor_is_refused_in_the_next_round(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")  # B, as in round 1
    manifest = aggregator.manifest(data, **second_round(aggregator))
    (answer,) = aggregator.deliver(manifest, data)
    assert answer.kind == "reject"
    assert "tensor 'A." in answer.reason
    assert "is missing" in answer.reason


def test_the_bytes_that_are_taken_follow_the_factor(aggregator: Aggregator) -> None:
    manifest = aggregator.manifest(b"")
    sizes = [
        tensor_bytes({s.name: s.shape for s in upload_stacks(job, manifest)}, "f32")
        for job in (make_job(), aggregator.job)
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    too_large = aggregator.manifest(b"\0" * (sizes[1] + (1 << 20) + 1))
    (answer,) = aggregator.offer(too_large)
    assert "more than its rank 64 takes" in answer.reason
