"""What a device may say of personal adapters, and what is refused, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.merge.round_view import change_norm
from aggregator.places import Place
from aggregator.updates import read_probe, read_update
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.messages import TrustLosses, UploadManifest
from protocol.probe import TopLogits, encode_probe
from protocol.tensors import encode
from tests.aggregator.uploading import DEVICE, Aggregator, make_job, update

pytestmark = pytest.mark.timeout(60)
PROBE = {"text": "A public text.", "positions": 3, "top_k": 4}
ANSWER = TopLogits(np.tile(np.arange(4), (3, 1)), np.ones((3, 4)))


def opened(folder: Path, **personal: Any) -> Aggregator:
    """Return an aggregator whose round starts from a version that says this of devices."""
    made = Aggregator(folder, make_job(rule="trust-predictions", probe=PROBE))
    first = made.store.version(1)
    assert first is not None
    made.store.add_version(first.model_copy(update=personal))
    made.greet()
    return made


@pytest.fixture
def common(tmp_path: Path) -> Iterator[Aggregator]:
    """The device starts from the common adapter, and has nothing to try but two candidates."""
    made = opened(tmp_path, candidates=2)
    yield made
    made.store.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Aggregator]:
    """The device starts from its own adapter, another one than the common, and has a trial."""
    made = opened(tmp_path, personal={DEVICE: 0}, trials=[DEVICE])
    place = Place("personal", 0, DEVICE)
    adapter = first_version(make_job(seed=5))
    made.store.issued.add(
        place, DEVICE, Versions(made.job, made.store).write_at(place, adapter, None)
    )
    yield made
    made.store.close()


def refused(aggregator: Aggregator, manifest: UploadManifest, data: bytes) -> str:
    answers = aggregator.deliver(manifest, data)
    assert [answer.kind for answer in answers] == ["reject"]
    assert aggregator.counted() == []
    return answers[0].reason


def test_what_is_said_as_it_should_be_counts(own: Aggregator) -> None:
    behind = encode_probe(ANSWER)
    data = encode(update(own.job), "f32") + behind
    trust = TrustLosses(received=2.0, own=1.9, trial=2.1)
    manifest = own.manifest(data, personal=0, trust=trust, probe_bytes=len(behind))
    assert [answer.kind for answer in own.deliver(manifest, data)] == ["done"]
    (counted,) = own.counted()
    assert counted.trust == trust
    kept = own.store.uploads.file(counted).read_bytes()
    probe = read_probe(own.job, counted, kept)
    assert probe is not None
    np.testing.assert_array_equal(probe.indices, ANSWER.indices)


def test_an_update_is_read_against_the_devices_own_adapter(own: Aggregator) -> None:
    changed = update(own.job)
    data = encode(changed, "f32")
    manifest = own.manifest(data, personal=0)
    versions = Versions(own.job, own.store)
    found = read_update(own.job, versions, manifest, data)
    module = "model.layers.0.q"
    held, at = (
        versions.load_at(Place("personal", 0, DEVICE)).layers[module],
        found.directions[module],
    )
    assert not np.array_equal(held.a, versions.load(1).layers[module].a)
    after = found.adapter.layers[module]
    np.testing.assert_allclose(after.a, held.a[at] + changed["A.64x260"][0], atol=1e-3)
    np.testing.assert_allclose(after.b, held.b[:, at] + changed["B.300x64"][0], atol=1e-6)
    moved = 2.0 * np.linalg.norm(after.b @ after.a - held.b[:, at] @ held.a[at])
    assert change_norm(found, versions.base(manifest)) == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"personal": 1}, "it starts from version 1 of its own adapter, the round from the common"),
        ({"trust": {"received": -0.1}}, "a loss of -0.1 on its trust split is not from 0"),
        ({"trust": {"received": 1e300}}, "a loss of 1e+300"),
        ({"trust": {"received": 2.0, "own": -1e300}}, "a loss of -1e+300"),
        ({"trust": {"received": 2.0, "candidates": {1: 1e7}}}, "a loss of 1e+07"),
        ({"trust": {"received": 2.0, "candidates": {2: 1.0}}}, "candidate 2; version 1 has 2"),
        ({"trust": {"received": 2.0, "trial": 1.0}}, "loss of a trial, and was given none"),
        ({"probe_bytes": 1_048_576 + 3 * 4 * 6 + 1}, "more than an answer to the probe takes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(common: Aggregator, changed: dict[str, Any], said: str) -> None:
    data = encode(update(common.job), "f32")
    data += bytes(changed.get("probe_bytes", 0))
    assert said in refused(common, common.manifest(data, **changed), data)


def test_who_has_an_adapter_of_its_own_starts_from_it(own: Aggregator) -> None:
    data = encode(update(own.job), "f32")
    said = "it starts from the common adapter, the round from version 0 of its own adapter"
    assert refused(own, own.manifest(data), data) == said


def test_a_probe_where_the_job_has_none(tmp_path: Path) -> None:
    made = Aggregator(tmp_path, make_job(rule="trust-weights"))
    made.greet()
    behind = encode_probe(ANSWER)
    data = encode(update(made.job), "f32") + behind
    manifest = made.manifest(data, probe_bytes=len(behind))
    assert refused(made, manifest, data) == "it answers a probe, and the job has none"
    made.store.close()


def spoilt() -> dict[str, bytes]:
    """Return what is refused of it → bytes."""
    good = encode_probe(ANSWER)
    nan = encode_probe(TopLogits(ANSWER.indices, np.full((3, 4), np.nan)))
    twice = encode_probe(TopLogits(np.zeros((3, 4), np.uint32), ANSWER.values))
    wide = TopLogits(np.tile(np.arange(5), (3, 1)), np.ones((3, 5)))
    return {
        "few": good[:7],
        "bytes of tensors": good[:-1],
        "header": b"\xff" * len(good),
        "not finite": nan,
        "twice": twice,
        "at most (3, 4)": encode_probe(wide),
    }


@pytest.mark.parametrize("case", [*spoilt()])
def test_an_answer_to_the_probe_that_is_none(common: Aggregator, case: str) -> None:
    behind = spoilt()[case]
    data = encode(update(common.job), "f32") + behind
    reason = refused(common, common.manifest(data, probe_bytes=len(behind)), data)
    assert case in reason or "header" in reason, reason


def test_an_update_cut_by_what_is_said_of_the_probe(common: Aggregator) -> None:
    data = encode(update(common.job), "f32")
    for size in (1, 8, len(data)):
        assert refused(common, common.manifest(data, probe_bytes=size), data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "null", '"2"x'])
def test_a_loss_that_is_no_number_is_not_read(common: Aggregator, number: str) -> None:
    data = encode(update(common.job), "f32")
    manifest = common.manifest(data, trust=TrustLosses(received=2.0))
    topic = topics.topic("upload_manifest", job="notes", device=DEVICE, upload=manifest.upload)

    class Spoilt(UploadManifest):
        def model_dump_json(self, **_: Any) -> str:
            return manifest.model_dump_json().replace('"received":2.0', f'"received":{number}')

    spoilt = Spoilt.model_construct()
    assert number in spoilt.model_dump_json()
    assert common.intake.handle(topic, common.device_key.seal(spoilt, topic)) == []
    assert common.heard()[-1] == "refused"
    assert [answer.kind for answer in common.deliver(manifest, data)] == ["done"]
