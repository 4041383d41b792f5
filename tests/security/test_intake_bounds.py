"""A device that misbehaves: bounded, kept out for a while, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.enrol.registry import Registry
from aggregator.intake import Intake
from aggregator.quota import FILES_A_ROUND, KEYS_KEPT, Bucket, RoundBytes
from aggregator.rounds import Policy, RoundState, next_action
from aggregator.updates import largest_upload
from aggregator.versions import Versions
from protocol.chunks import CHUNK_BYTES, split
from protocol.connecting import WINDOW
from protocol.events import EventLog
from protocol.tensors import encode
from tests.aggregator.uploading import DEVICE, Aggregator, make_job, update


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path / "state", make_job())
    made.greet()
    yield made
    made.store.close()


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def with_clock(aggregator: Aggregator, policy: Policy, registry: Registry | None = None) -> Clock:
    clock = Clock()
    aggregator.intake = Intake(
        aggregator.job,
        aggregator.store,
        Versions(aggregator.job, aggregator.store),
        aggregator.key,
        EventLog(as_json=True, stream=aggregator.events),
        policy=policy,
        registry=registry,
        clock=clock,
    )
    return clock


def in_round(aggregator: Aggregator, number: int) -> None:
    aggregator.store.set_round(RoundState(number, "open", 1, None))


def test_bad_updates_in_a_row_lead_to_quarantine_and_it_ends(aggregator: Aggregator) -> None:
    clock = with_clock(aggregator, Policy(quarantine_after=3, quarantine_s=60))
    good = encode(update(aggregator.job), "f32")
    bad = encode({"A.64x260": np.zeros((1, 64, 260))}, "f32")
    for number in (1, 2, 3):
        in_round(aggregator, number)
        (answer,) = aggregator.deliver(aggregator.manifest(bad, round=number), bad)
        assert answer.kind == "reject" and "quarantine" not in answer.reason
    assert aggregator.heard().count("quarantined") == 1
    assert aggregator.store.devices.quarantined(clock.now) == {DEVICE}

    in_round(aggregator, 4)
    (answer,) = aggregator.deliver(aggregator.manifest(good, round=4), good)
    assert "too much of what it sent was refused" in answer.reason
    aggregator.reopen()
    clock = with_clock(aggregator, Policy(quarantine_after=3, quarantine_s=60))
    in_round(aggregator, 5)
    (answer,) = aggregator.deliver(aggregator.manifest(good, round=5), good)
    assert answer.kind == "reject", "it outlives a restart"

    clock.now += 61
    in_round(aggregator, 6)
    (answer,) = aggregator.deliver(aggregator.manifest(good, round=6), good)
    assert answer.kind == "done"
    assert aggregator.store.devices.quarantined(clock.now) == set()


def test_a_good_update_in_between_and_being_late_are_no_faults(aggregator: Aggregator) -> None:
    with_clock(aggregator, Policy(quarantine_after=2))
    good = encode(update(aggregator.job), "f32")
    bad = encode({"A.64x260": np.zeros((1, 64, 260))}, "f32")
    for number, data in ((1, bad), (2, good), (3, bad), (4, good)):
        in_round(aggregator, number)
        aggregator.deliver(aggregator.manifest(data, round=number), data)
    in_round(aggregator, 20)
    for late in range(5, 15):
        (answer,) = aggregator.offer(aggregator.manifest(good, round=late))
        assert "is over" in answer.reason
    assert "quarantined" not in aggregator.heard()


def test_made_up_manifests_leave_next_to_nothing(aggregator: Aggregator) -> None:
    """A device can sign any number; of what it had refused the last is kept."""
    clock = with_clock(aggregator, Policy(quarantine_after=1000))
    good = encode(update(aggregator.job), "f32")
    wrong = {"held": 129, "rank": 64}
    for number in range(200):
        clock.now += 1
        (answer,) = aggregator.offer(aggregator.manifest(good, round=1000 + number))
        assert answer.kind == "reject" and "has not begun (it is round 1, open)" in answer.reason
        in_round(aggregator, number + 2)
        (answer,) = aggregator.offer(aggregator.manifest(good, round=number + 2, **wrong))
        assert answer.kind == "reject" and "it claims 129 directions" in answer.reason
        in_round(aggregator, 1)
    rows = aggregator.store._db.rows("SELECT upload FROM uploads")
    assert len(rows) == 1
    made_up = [e for e in aggregator.heard() if e == "rejected"]
    assert len(made_up) < 200 + 10, "those of no matter are logged once a minute"
    (answer,) = aggregator.deliver(aggregator.manifest(good), good)
    assert answer.kind == "done"


def test_quarantine_ends_by_time_alone_and_counting_takes_back_one_strike(
    aggregator: Aggregator,
) -> None:
    clock = with_clock(aggregator, Policy(quarantine_after=3, quarantine_s=60))
    data = encode(update(aggregator.job), "f32")
    manifest, chunks = aggregator.manifest(data), split(data)
    aggregator.offer(manifest)
    for index, chunk in enumerate(chunks[:-1]):
        aggregator.chunk(manifest, index, chunk)
    for _ in range(3):
        aggregator.intake.blame(DEVICE)
    (answer,) = aggregator.chunk(manifest, len(chunks) - 1, chunks[-1])
    assert answer.kind == "reject" and "quarantine" in answer.reason
    clock.now += 61
    for number, kind in ((2, "done"), (3, "reject")):
        for _ in range(2):
            aggregator.intake.blame(DEVICE)
        in_round(aggregator, number)
        answers = aggregator.deliver(aggregator.manifest(data, round=number), data)
        assert answers[-1].kind == kind, "one strike of two is left from the round before"


def test_a_status_of_an_earlier_start_is_refused_and_logged(aggregator: Aggregator) -> None:
    aggregator.greet(boot=9)
    aggregator.greet(boot=5)
    known = aggregator.store.devices.status(DEVICE)
    assert known is not None and known.boot == 9
    assert "it is of start 5, a later one has been heard" in aggregator.events.getvalue()


def test_no_round_waits_for_who_is_kept_out() -> None:
    now, policy = RoundState(1, "open", 1, None), Policy()
    place = {"job": "notes", "rounds": 3, "time_s": 0.0}
    online, kept_out = {"good", "bad"}, {"bad"}
    assert next_action(now, policy, **place, online=online, delivered={"good"}) is None
    found = next_action(now, policy, **place, online=online - kept_out, delivered={"good"})
    assert found == "merge"


def test_bytes_of_a_round_are_bounded_by_the_rank(aggregator: Aggregator) -> None:
    """Wrong chunks count as well: who sends for ever is refused, and the refusal is kept."""
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    limit = FILES_A_ROUND * largest_upload(aggregator.job, manifest)
    answers = []
    for _ in range(limit // CHUNK_BYTES):
        answers += aggregator.chunk(manifest, 0, bytes(CHUNK_BYTES))
    assert [answer.kind for answer in answers] == ["need"], "asked for again, once"
    answers = aggregator.chunk(manifest, 0, bytes(CHUNK_BYTES))
    assert answers[-1].kind == "reject" and f"more than {limit} bytes" in answers[-1].reason
    assert aggregator.chunk(manifest, 0, split(data)[0]) == []
    (answer,) = aggregator.offer(aggregator.manifest(data, examples=11))
    assert answer.kind == "reject" and "bytes in this round" in answer.reason


def test_a_device_has_one_upload_open(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    first = aggregator.manifest(data)
    aggregator.offer(first)
    aggregator.chunk(first, 0, split(data)[0])
    in_round(aggregator, 2)
    second = aggregator.manifest(data, round=2)
    aggregator.offer(second)
    assert aggregator.store.uploads.known(first.upload) is None
    assert len(aggregator.store.uploads.missing_chunks(first)) == len(split(data))
    assert aggregator.chunk(first, 1, split(data)[1]) == []


def test_a_flood_of_messages_is_dropped_and_hardly_logged(aggregator: Aggregator) -> None:
    clock = with_clock(aggregator, Policy())
    before = len(aggregator.heard())
    for number in range(1000):
        aggregator.intake.handle(f"tunefleet/1/notes/d/{DEVICE}/status", b"nonsense")
        aggregator.intake.handle(f"tunefleet/1/notes/d/{DEVICE}/up/x{number}/0", b"")
    assert len(aggregator.heard()) - before < 300
    data = encode(update(aggregator.job), "f32")
    assert aggregator.offer(aggregator.manifest(data)) == []
    clock.now += 2
    (need,) = aggregator.offer(aggregator.manifest(data))
    assert need.kind == "need"


def test_who_floods_with_chunks_that_are_not_expected_is_named_and_kept_out(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    """A window of them, on their way when the upload was over, is no fault."""
    registry = Registry(tmp_path / "registry.db")
    registry._db.run(
        "INSERT INTO devices VALUES (?, ?, NULL)", DEVICE, aggregator.device_key.public
    )
    clock = with_clock(aggregator, Policy(quarantine_after=2), registry)
    data = encode(update(aggregator.job), "f32")
    chunk = f"tunefleet/1/notes/d/{DEVICE}/up/{0:032x}/0"
    for _ in range(WINDOW):
        assert aggregator.intake.handle(chunk, b"x") == []
    (answer,) = aggregator.deliver(aggregator.manifest(data), data)
    assert answer.kind == "done" and "flooding" not in aggregator.heard()
    for minute in range(1, 3):
        for _ in range(2000):
            aggregator.intake.handle(chunk, b"x")
        assert aggregator.heard().count("flooding") == minute
        clock.now += 61
    assert aggregator.store.devices.quarantined(clock.now) == {DEVICE}
    registry.close()


def test_buckets_and_bytes() -> None:
    bucket = Bucket(burst=2, per_s=1)
    assert [bucket.take("a", t) for t in (0, 0, 0, 0.5, 1.0, 1.5)] == [
        True, True, False, False, True, False,
    ]  # fmt: skip
    assert bucket.take("b", 0)
    assert not bucket.take("a", -5), "a clock that goes back gives nothing"
    for number in range(3 * KEYS_KEPT):
        bucket.take(f"key {number}", 100 + number)
    assert len(bucket._left) <= KEYS_KEPT + 1
    sent, first, second = RoundBytes(), (1, 0), (1, 1)
    sent.add("a", first, 5)
    sent.add("a", first, 5)
    assert (sent.sent("a", first), sent.sent("b", first), sent.sent("a", second)) == (10, 0, 0)
    sent.add("a", second, 1)
    assert (sent.sent("a", first), sent.sent("a", second)) == (0, 1)
