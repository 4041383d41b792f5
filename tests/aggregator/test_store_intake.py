"""A device's update on its way through the intake: counted once, or refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.errors import StoreError
from aggregator.rounds import RoundState
from aggregator.store import Store
from aggregator.updates import upload_stacks
from protocol import topics
from protocol.chunks import split
from protocol.messages import UploadManifest
from protocol.signing import SigningKey
from protocol.tensors import Encoding, decode, encode
from tests.aggregator.uploading import DEVICE, OPEN, Aggregator, make_job, update


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path / "state", make_job())
    made.greet()
    yield made
    made.store.close()


def test_an_update_is_asked_for_taken_and_counted_once(aggregator: Aggregator) -> None:
    tensors = update(aggregator.job)
    data = encode(tensors, "f32")
    chunks = split(data)
    assert len(chunks) >= 2
    manifest = aggregator.manifest(data)
    (need,) = aggregator.offer(manifest)
    assert (need.kind, need.chunks) == ("need", list(range(len(chunks))))
    for index in range(1, len(chunks)):
        assert aggregator.chunk(manifest, index, chunks[index]) == []
        assert aggregator.chunk(manifest, index, chunks[index]) == []  # QoS 1 delivers twice
    (need,) = aggregator.offer(manifest)
    assert need.chunks == [0]
    (done,) = aggregator.chunk(manifest, 0, chunks[0])
    assert (done.kind, done.upload) == ("done", manifest.upload)
    assert aggregator.chunk(manifest, 0, chunks[0]) == []
    (again,) = aggregator.offer(manifest)
    assert again.kind == "done"
    (other,) = aggregator.offer(aggregator.manifest(data, examples=99))
    assert other.kind == "done"
    assert aggregator.counted() == [manifest]
    assert aggregator.heard().count("counted") == 1
    kept = aggregator.store.uploads.file(manifest).read_bytes()
    assert kept == data
    found = decode(kept, {s.name: s.shape for s in upload_stacks(aggregator.job, manifest)}, "f32")
    assert all(np.array_equal(found[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8"])
def test_every_encoding_is_taken(tmp_path: Path, encoding: Encoding) -> None:
    made = Aggregator(tmp_path, make_job(encoding))
    made.greet()
    data = encode(update(made.job), encoding)
    (answer,) = made.deliver(made.manifest(data), data)
    assert answer.kind == "done"
    made.store.close()


def test_row_scales_may_be_larger_than_the_codes(tmp_path: Path) -> None:
    """At rank 2 each row of B has 2 bytes of codes and 4 of scale: over a MiB in a large model."""
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": (300_000, 4)}}
    made = Aggregator(tmp_path, make_job("int8", base=base))
    made.greet()
    data = encode({"A.2x4": np.zeros((1, 2, 4)), "B.300000x2": np.zeros((1, 300_000, 2))}, "int8")
    (answer,) = made.deliver(made.manifest(data, rank=2, rank_trained=2), data)
    assert (answer.kind, answer.reason) == ("done", "")
    made.store.close()


def test_chunks_and_counts_survive_reopening_the_store(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    chunks, manifest = split(data), aggregator.manifest(data)
    aggregator.offer(manifest)
    aggregator.chunk(manifest, 0, chunks[0])
    aggregator.reopen()
    (need,) = aggregator.offer(manifest)
    assert need.chunks == list(range(1, len(chunks)))
    (done,) = aggregator.deliver(manifest, data)
    assert done.kind == "done"
    aggregator.reopen()
    (again,) = aggregator.offer(manifest)
    assert again.kind == "done"
    assert aggregator.store.round() == OPEN
    assert len(aggregator.counted()) == 1


def test_other_bytes_under_the_same_upload_begin_it_anew(aggregator: Aggregator) -> None:
    first, second = (encode(update(aggregator.job, size), "f32") for size in (0.01, 0.02))
    aggregator.offer(aggregator.manifest(first))
    aggregator.chunk(aggregator.manifest(first), 0, split(first)[0])
    (need,) = aggregator.offer(aggregator.manifest(second))
    assert need.chunks == list(range(len(split(second))))
    (done,) = aggregator.deliver(aggregator.manifest(second), second)
    assert done.kind == "done"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 2}, "version 2"),
        ({"round": 7}, "round 7 has not begun"),
        ({"round": 0}, "round 0 is over"),
        ({"held": 129}, "129 directions"),
        ({"encoding": "bf16"}, "encoding is bf16"),
        ({"rank": 2}, "more than its rank 2 takes|instead|missing"),
        ({"rank": 128, "rank_trained": 128}, "q) is missing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    aggregator: Aggregator, changed: dict[str, Any], reason: str
) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data, **changed)
    refused(aggregator, manifest, data, reason)


def bad(name: str) -> bytes:
    job = make_job()
    tensors = update(job)
    first = min(tensors)
    if name == "nan":
        tensors[first][0, 0, 0] = np.nan
    elif name == "infinite":
        tensors[first][-1, -1, -1] = np.inf
    elif name == "norm":
        tensors = update(job, 1e4)
    elif name == "largest":
        tensors = {n: np.full_like(t, np.finfo(np.float32).max) for n, t in tensors.items()}
    elif name == "shape":
        tensors[first] = tensors[first][:, :-1]
    elif name == "missing":
        del tensors[first]
    elif name == "extra":
        tensors["a" * 2000] = np.zeros((1, 1, 1), np.float32)
    elif name == "garbage":
        return bytes(200_000)
    elif name == "empty":
        return b""
    data = encode(tensors, "bf16" if name == "dtype" else "f32")
    return data[:-100] if name == "cut" else data


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "not finite"),
        ("infinite", "not finite"),
        ("norm", "norm"),
        ("largest", "norm|finite"),
        ("shape", "imply"),
        ("missing", "missing"),
        ("extra", "tensor 'aaaa"),
        ("garbage", "header"),
        ("empty", "too few"),
        ("dtype", "imply"),
        ("cut", "header accounts for"),
    ],
)
def test_bad_bytes_are_refused_with_a_reason(
    aggregator: Aggregator, name: str, reason: str
) -> None:
    data = bad(name)
    refused(aggregator, aggregator.manifest(data), data, reason)


def refused(a: Aggregator, manifest: UploadManifest, data: bytes, reason: str) -> None:
    """Deliver and see it refused, now and again, after which a good update is still counted."""
    for _ in range(2):
        (answer,) = a.deliver(manifest, data)
        assert (answer.kind, answer.upload) == ("reject", manifest.upload)
        assert any(part in answer.reason for part in reason.split("|")), answer.reason
    assert a.counted() == []
    assert a.heard().count("rejected") == 1
    good = encode(update(a.job), "f32")
    (answer,) = a.deliver(a.manifest(good), good)
    assert answer.kind == "done"


def test_a_metric_that_cannot_be_is_refused(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data, metrics={"tokens_3": -1.0})
    refused(aggregator, manifest, data, "its metric tokens_3 is -1, not a number from 0 to")


def test_a_chunk_with_a_wrong_hash_length_or_index_is_dropped(aggregator: Aggregator) -> None:
    """Chunks are not signed: a wrong one may be anybody's, and says nothing about the upload."""
    data = encode(update(aggregator.job), "f32")
    chunks = split(data)
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    for index, wrong in [(0, chunks[0][:-1] + b"!"), (1, chunks[0][:9])]:
        (need,) = aggregator.chunk(manifest, index, wrong)
        assert (need.kind, need.upload, need.chunks) == ("need", manifest.upload, [index])
    assert aggregator.chunk(manifest, 9999, b"") == []  # there is nothing to ask for
    assert aggregator.heard() == ["device", "refused", "refused", "refused"]
    assert "chunk 0 does not have the announced hash" in aggregator.events.getvalue()
    (need,) = aggregator.offer(manifest)
    assert need.chunks == list(range(len(chunks)))
    (done,) = aggregator.deliver(manifest, data)
    assert done.kind == "done"
    assert aggregator.counted() == [manifest]


def test_broken_chunks_without_end_are_asked_for_once_each(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    chunks = split(data)
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    aggregator.chunk(manifest, 1, chunks[1])
    answers = [
        answer
        for _ in range(5)
        for index in range(len(chunks))
        for answer in aggregator.chunk(manifest, index, b"broken")
    ]
    missing = [0, *range(2, len(chunks))]
    assert [a.chunks for a in answers] == [[index] for index in missing]
    (need,) = aggregator.offer(manifest)  # as the device does when it hears nothing
    assert need.chunks == missing
    (done,) = aggregator.deliver(manifest, data)
    assert done.kind == "done"


def test_a_broken_chunk_of_a_round_that_is_over_is_not_asked_for(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    aggregator.store.set_round(RoundState(2, "open", 1, None))
    assert aggregator.chunk(manifest, 0, b"broken") == []


def test_chunks_that_nobody_announced_are_dropped(aggregator: Aggregator) -> None:
    manifest = aggregator.manifest(b"x")
    assert aggregator.chunk(manifest, 0, b"x") == []
    assert aggregator.store.uploads.known(manifest.upload) is None


def test_a_round_that_ends_while_chunks_travel(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    aggregator.store.set_round(RoundState(2, "open", 1, None))
    answers = [a for i, c in enumerate(split(data)) for a in aggregator.chunk(manifest, i, c)]
    assert [a.kind for a in answers] == ["reject"]
    assert "round 1 is over" in answers[0].reason


# -- who says so ---------------------------------------------------------------------------------


def test_a_foreign_signature_is_refused(aggregator: Aggregator) -> None:
    thief = SigningKey.generate()
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    assert aggregator.offer(manifest, thief) == []
    aggregator.greet(key=thief, boot=9)  # the first key that spoke is the device's
    assert aggregator.heard() == ["device", "refused", "refused"]
    status = aggregator.store.devices.status(DEVICE)
    assert status is not None
    assert status.boot == 1
    assert aggregator.store.uploads.known(manifest.upload) is None
    (need,) = aggregator.offer(manifest)
    assert need.kind == "need"


def test_a_device_that_has_not_said_who_it_is_offers_nothing(aggregator: Aggregator) -> None:
    manifest = aggregator.manifest(b"x", device="stranger")
    assert aggregator.offer(manifest) == []
    assert aggregator.heard()[-1] == "refused"


@pytest.mark.parametrize("changed", [{"device": "phone-2"}, {"job": "other"}, {"upload": "0" * 32}])
def test_a_manifest_speaks_of_its_own_topic(
    aggregator: Aggregator, changed: dict[str, Any]
) -> None:
    own = aggregator.manifest(b"x")
    topic = topics.topic("upload_manifest", job="notes", device=DEVICE, upload=own.upload)
    other = aggregator.manifest(b"x", **changed)
    assert aggregator.intake.handle(topic, aggregator.device_key.seal(other, topic)) == []
    assert aggregator.heard()[-1] == "refused"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"\xff" * 50, b"[" * 9999, b'{"body": "\\ud800"}'],
    ids=["empty", "no fields", "no text", "deep", "surrogate"],
)
@pytest.mark.parametrize("kind", ["status", "upload_manifest", "upload_chunk"])
def test_no_payload_raises(aggregator: Aggregator, kind: str, payload: bytes) -> None:
    topic = topics.topic(kind, job="notes", device=DEVICE, upload="0" * 32, index=0)
    assert aggregator.intake.handle(topic, payload) == []
    assert aggregator.intake.handle("tunefleet/9/x", payload) == []
    assert aggregator.intake.handle("elsewhere", payload) == []


def test_a_topic_of_no_device_is_refused_in_a_sentence(aggregator: Aggregator) -> None:
    for kind in ("job", "round"):
        topic = topics.topic(kind, job="notes")
        assert aggregator.intake.handle(topic, b"{}") == []
        said = json.loads(aggregator.events.getvalue().splitlines()[-1])
        assert said["reason"] == (
            f"malformed message on {topic}: devices don't publish there: it is no topic of one"
        )


def test_a_device_that_plans_is_known_and_not_waited_for(aggregator: Aggregator) -> None:
    before = aggregator.store.devices.status("phone-1")
    assert before is not None and aggregator.store.devices.ready() == {"phone-1"}
    topic = topics.topic("status", job="notes", device="phone-1")
    for state, ready in (("planning", set()), ("idle", {"phone-1"})):
        status = before.model_copy(update={"state": state, "rank": 0})
        aggregator.intake.handle(topic, aggregator.device_key.seal(status, topic))
        known = aggregator.store.devices.status("phone-1")
        assert known is not None and known.state == state
        assert aggregator.store.devices.ready() == ready


def test_a_store_belongs_to_one_job(aggregator: Aggregator) -> None:
    aggregator.store.bind_job(aggregator.job)
    for other, said in (
        (make_job(seed=1), "job 'notes', where seed is 0, not 1;"),
        (make_job(training={"steps": 60}), "job 'notes', where training.steps is 12, not 60;"),
        (make_job(rule_settings={"split": "left"}), 'rule_settings.split is unset, not "left";'),
        (make_job(job="letters", seed=1), "job 'notes', not 'letters';"),
    ):
        with pytest.raises(StoreError, match=re.escape(said)):
            aggregator.store.bind_job(other)


def test_a_damaged_store_is_not_to_be_had_in_another_folder(aggregator: Aggregator) -> None:
    aggregator.store.close()
    for name in ("store.sqlite", "store.sqlite-wal"):
        if (file := aggregator.folder / name).exists():
            file.write_bytes(b"no database" * 1000)
    with pytest.raises(
        StoreError, match=r"store\.sqlite is damaged .*from a backup, or begin anew"
    ):
        Store(aggregator.folder)
