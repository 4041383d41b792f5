"""A round that got too little is tried again: more are asked, and who was refused once more."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.rounds import RoundState
from aggregator.store import Store
from edge_client.outbox import Outbox
from protocol.chunks import CHUNK_BYTES
from protocol.errors import Replayed
from protocol.messages import Round, UploadManifest, describe_file, upload_id
from protocol.tensors import encode
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import Learn, LightDevice, run_until
from tests.aggregator.uploading import DEVICE, OPEN, Aggregator, make_job, update
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
SECOND = RoundState(1, "open", 1, None, attempt=1)
JOB = make_job(rounds=2, ladder=[2, 4])


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path / "state", make_job())
    made.greet()
    yield made
    made.store.close()


def again(aggregator: Aggregator, data: bytes, attempt: int = 1) -> UploadManifest:
    upload = upload_id(DEVICE, "notes", 1, attempt)
    return aggregator.manifest(data, attempt=attempt, upload=upload)


# -- the whole way: a real aggregator and broker, devices without a model -----------------------


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


class Fleet:
    def __init__(
        self, tmp_path: Path, broker: BrokerAddress, stack: ExitStack, **policy: Any
    ) -> None:
        self.folder, self.broker, self.stack = tmp_path, broker, stack
        file = tmp_path / "job.json"
        file.write_text(json.dumps({**JOB.model_dump(), "policy": policy}))
        arguments = ["serve", file, "--state", tmp_path / "state", "--broker", broker]
        arguments += ["--json", "--exit-when-done"]
        program = Program("aggregator", arguments, tmp_path, "aggregator")
        self.aggregator = stack.enter_context(program)
        self.aggregator.wait_for("serving")

    def device(self, name: str, learn: Learn) -> LightDevice:
        made = LightDevice(self.broker, self.folder / name, name, JOB, learn)
        self.stack.callback(made.close)
        return made

    def run(self, *devices: LightDevice) -> None:
        """Let the job be done; the devices hear of its end too."""
        run_until(lambda: all(d.round and d.round.state == "finished" for d in devices), *devices)
        assert self.aggregator.wait() == 0, self.aggregator.stderr
        assert [e["round"] for e in self.aggregator.of("merged")] == [1, 2]


def test_a_device_that_was_refused_trains_again(
    tmp_path: Path, mosquitto: BrokerAddress, stack: ExitStack
) -> None:
    fleet = Fleet(tmp_path, mosquitto, stack, deadline_s=1)
    bad_at_first = fleet.device("kitchen", lambda now: 1e-3 if now.attempt else np.nan)
    fleet.run(bad_at_first)
    assert bad_at_first.trained == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [e["round"] for e in bad_at_first.events("rejected")] == [1, 2]
    counted = [(e["device"], e["round"]) for e in fleet.aggregator.of("counted")]
    assert counted == [("kitchen", 1), ("kitchen", 2)]
    end = fleet.aggregator.of("round")[-1]
    assert (end["state"], end["attempt"]) == ("finished", 1), "no device takes it for an old round"


def test_a_cohort_that_is_too_small_is_widened_at_once(
    tmp_path: Path, mosquitto: BrokerAddress, stack: ExitStack
) -> None:
    fleet = Fleet(
        tmp_path, mosquitto, stack, min_devices=3, quorum=2, fraction=0.05, deadline_s=3600
    )
    devices = [fleet.device(name, lambda now: 1e-3) for name in ("kitchen", "desk", "attic")]
    fleet.run(*devices)
    for number in (1, 2):
        trained = [d.name for d in devices if number in [r for r, _ in d.trained]]
        counted = [e["device"] for e in fleet.aggregator.of("counted") if e["round"] == number]
        assert len(trained) >= 2
        assert sorted(trained) == sorted(counted), "each trains once in a round, and counts once"
    shares = [e["fraction"] for e in fleet.aggregator.of("round") if e["round"] == 1]
    assert shares == sorted(shares)


def test_what_a_rule_could_not_do_is_said_once_a_round(
    tmp_path: Path, mosquitto: BrokerAddress, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_job(rounds=2, ladder=[2, 4], rule_settings={"weights": "loss-reduction"})
    monkeypatch.setattr("tests.aggregator.test_attempts.JOB", asked)
    fleet = Fleet(tmp_path, mosquitto, stack, min_devices=2, quorum=2)
    kitchen, desk = (fleet.device(name, lambda now: 1e-3) for name in ("kitchen", "desk"))
    kitchen.metrics = {"train_loss_before": 2.0, "train_loss_after": 1.0}
    fleet.run(kitchen, desk)
    why = "device desk did not send the metric train_loss_before; shares go by examples"
    assert [(e["round"], e["reason"]) for e in fleet.aggregator.of("warning")] == [
        (1, why),
        (2, why),
    ]


# -- the aggregator -----------------------------------------------------------------------------


def test_an_update_counts_after_one_of_it_was_refused(aggregator: Aggregator) -> None:
    bad, good = (encode(update(aggregator.job, size), "f32") for size in (1e4, 0.01))
    (answer,) = aggregator.deliver(aggregator.manifest(bad), bad)
    assert answer.kind == "reject"
    (answer,) = aggregator.deliver(again(aggregator, good), good)
    assert (answer.kind, answer.reason) == ("reject", "attempt 1 at round 1 has not begun")
    aggregator.store.set_round(SECOND)
    (answer,) = aggregator.deliver(again(aggregator, good, 2), good)
    assert "attempt 2 at round 1 has not begun" in answer.reason
    second = again(aggregator, encode(update(aggregator.job, 0.02), "f32"))
    (answer,) = aggregator.deliver(second, encode(update(aggregator.job, 0.02), "f32"))
    assert answer.kind == "done"
    assert aggregator.counted() == [second]


def test_what_is_on_its_way_from_the_attempt_before_counts(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    aggregator.store.set_round(SECOND)
    (answer,) = aggregator.deliver(manifest, data)
    assert answer.kind == "done"


@pytest.mark.parametrize("first", [0, 1])
def test_two_of_a_device_never_count_in_a_round(aggregator: Aggregator, first: int) -> None:
    data = encode(update(aggregator.job), "f32")
    aggregator.store.set_round(SECOND)
    one, other = again(aggregator, data, first), again(aggregator, data, 1 - first)
    if first == 0:
        one = aggregator.manifest(data)
    else:
        other = aggregator.manifest(data)
    aggregator.offer(other)
    (answer,) = aggregator.deliver(one, data)
    assert answer.kind == "done"
    (answer,) = aggregator.deliver(other, data)
    assert (answer.kind, answer.upload) == ("done", other.upload), "there is nothing more to do"
    assert aggregator.counted() == [one]
    aggregator.store.uploads.expect(other)
    with pytest.raises(sqlite3.IntegrityError):
        aggregator.store.uploads.count(other)


def test_an_attempt_has_bytes_of_its_own(aggregator: Aggregator) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    aggregator.offer(manifest)
    while not (answers := aggregator.chunk(manifest, 0, bytes(CHUNK_BYTES))) or (
        answers[-1].kind == "need"
    ):
        pass
    assert "bytes in this round" in answers[-1].reason
    aggregator.store.set_round(SECOND)
    (answer,) = aggregator.deliver(again(aggregator, data), data)
    assert answer.kind == "done"


def test_a_state_from_before_attempts_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store._set_meta("round", '{"number": 1, "state": "open", "version": 1, "deadline": null}')
    assert store.round() == OPEN
    store.set_round(SECOND)
    assert store.round() == SECOND
    store.close()


# -- the device ---------------------------------------------------------------------------------


def said(number: int, attempt: int, state: str = "open") -> Round:
    fields = {"job": "notes", "number": number, "attempt": attempt, "state": state, "version": 1}
    return Round.model_validate(fields)


def trained(number: int, attempt: int) -> UploadManifest:
    return UploadManifest(
        job="notes", device=DEVICE, upload=upload_id(DEVICE, "notes", number, attempt),
        round=number, attempt=attempt, version=1, rank=2, rank_trained=2, held=2, encoding="f32",
        file=describe_file(b"data"), examples=1,
    )  # fmt: skip


def test_which_rounds_a_device_trains_for(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    first, second = trained(1, 0), trained(1, 1)
    assert outbox.is_due(said(1, 0))
    outbox.put(first, b"data", rank=2)
    assert not outbox.is_due(said(1, 0))
    assert not outbox.is_due(said(1, 1)), "it is on its way"
    outbox.refuse(first)
    assert outbox.pending() == []
    outbox.close()
    outbox = Outbox(tmp_path)
    assert not outbox.is_due(said(1, 0)), "it was refused in this attempt"
    assert outbox.is_due(said(1, 1))
    outbox.put(second, b"data", rank=2)
    assert not outbox.is_due(said(1, 2))
    outbox.drop(second.upload)
    assert not outbox.is_due(said(1, 2)), "it has been counted"
    assert outbox.is_due(said(2, 0))
    outbox.put(trained(2, 3), b"data", rank=2)
    outbox.refuse(second)
    assert not outbox.is_due(said(2, 4)), "what was refused is of an earlier round"
    assert outbox.is_due(said(3, 0))
    outbox.close()


def test_attempts_of_a_round_never_go_back(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for now in (said(5, 0), said(5, 2), said(5, 2, "finished"), said(6, 0), said(6, 1)):
        outbox.check_round(now)
    outbox.close()
    outbox = Outbox(tmp_path)
    with pytest.raises(Replayed, match="attempt 0 of job 'notes' is older than attempt 1"):
        outbox.check_round(said(6, 0))
    with pytest.raises(Replayed, match="round 5 of job 'notes' is older than round 6"):
        outbox.check_round(said(5, 7))
    outbox.check_round(said(6, 1))
    outbox.close()


def test_the_id_of_a_first_attempt_is_as_it_was() -> None:
    assert upload_id("a", "x", 3) == upload_id("a", "x", 3, 0)
    assert len({upload_id("a", "x", 3, attempt) for attempt in range(4)}) == 4
