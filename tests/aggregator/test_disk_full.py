"""A disk that is full: uploads wait, nothing that was answered is lost, and each counts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from aggregator.errors import StoreError
from aggregator.store import Store
from edge_client.outbox import Pending
from protocol.chunks import split
from protocol.tensors import encode
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice, run_until
from tests.aggregator.uploading import Aggregator, make_job, update
from tests.faults.processes import Program
from tests.faults.small_disk import MIB, fill, mounted

pytestmark = pytest.mark.timeout(180)
DISK_MIB = 96
BASE = {"name": "toy", "sha256": "0" * 64, "parameters": 1, "modules": {"m": (300_000, 4)}}
JOB = make_job(base=BASE, ladder=[2, 4], rounds=1)
"""An update of rank 2 has 2.3 MiB: 19 chunks."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a small disk of this test's own."""
    with mounted(tmp_path / "disk", DISK_MIB * MIB) as why:
        if why:
            pytest.skip(why)
        yield tmp_path / "disk"


def test_an_upload_waits_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregator = Aggregator(tmp_path / "state", make_job())
    aggregator.greet()
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    with monkeypatch.context() as patch:
        patch.setattr("aggregator.store.RESERVE_BYTES", 1 << 62)
        (answer,) = aggregator.offer(manifest)
        assert (answer.kind, answer.upload) == ("wait", manifest.upload)
        assert "disk is full" in answer.reason
        assert aggregator.store.uploads.known(manifest.upload) is None
        assert aggregator.heard()[-1] == "full"
    (answer,) = aggregator.deliver(manifest, data)
    assert answer.kind == "done"
    aggregator.store.close()


def test_a_write_that_fails_is_one_error_and_leaves_the_store_in_order(disk: Path) -> None:
    aggregator = Aggregator(disk / "state", JOB)
    aggregator.greet()
    data = encode({"A.2x4": np.zeros((1, 2, 4)), "B.300000x2": np.zeros((1, 300_000, 2))}, "f32")
    manifest = aggregator.manifest(data, rank=2, rank_trained=2, held=4)
    (need,) = aggregator.offer(manifest)
    chunks = split(data)
    ballast = fill(disk)
    with pytest.raises(StoreError, match=r"state: .*make room there"):
        [aggregator.chunk(manifest, index, chunks[index]) for index in need.chunks]
    assert aggregator.counted() == []
    ballast.unlink()
    aggregator.reopen()
    (answer,) = aggregator.deliver(manifest, data)
    assert answer.kind == "done"
    assert aggregator.counted() == [manifest]
    aggregator.store.close()


def test_a_disk_that_is_full_at_the_start_is_called_so(disk: Path) -> None:
    Store(disk / "state").close()
    fill(disk)
    with pytest.raises(StoreError, match=r"state: .*full.*; make room there"):
        Store(disk / "state")


def test_an_aggregator_whose_disk_fills_up_goes_on_when_there_is_room(
    tmp_path: Path, disk: Path, mosquitto: BrokerAddress
) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({**JOB.model_dump(), "policy": {"min_devices": 2, "quorum": 2}}))
    arguments = ["serve", file, "--state", disk / "state", "--broker", mosquitto, "--json"]
    with ExitStack() as stack:

        def serve() -> Program:
            made = Program("aggregator", [*arguments, "--exit-when-done"], tmp_path, "aggregator")
            stack.enter_context(made).wait_for("serving")
            return made

        def device(name: str) -> LightDevice:
            made = LightDevice(mosquitto, tmp_path / name, name, JOB, lambda now: 1e-3)
            stack.callback(made.close)
            return made

        first = serve()
        desk, kitchen = device("desk"), device("kitchen")
        run_until(lambda: bool(desk.trained) and not desk.outbox.pending(), desk)
        assert [e["device"] for e in first.of("counted")] == ["desk"]

        ballast = fill(disk, 50 * MIB)
        run_until(lambda: bool(kitchen.events("waiting")), kitchen)
        assert "disk is full" in kitchen.events("waiting")[0]["reason"]
        assert len(kitchen.outbox.pending()) == 1
        ballast.unlink()

        on_sending(kitchen, lambda: fill(disk))
        kitchen.offer_again()
        run_until(lambda: first.process.poll() is not None, kitchen)
        assert first.wait() == 1
        assert first.stderr.startswith("error: can't use the aggregator's state in")
        assert first.stderr.count("\n") == 1, first.stderr
        assert len(kitchen.outbox.pending()) == 1

        (disk / "ballast-0").unlink()
        second = serve()
        run_until(lambda: second.process.poll() is not None, desk, kitchen)
        assert second.wait() == 0, second.stderr
        assert (desk.trained, kitchen.trained) == ([(1, 0)], [(1, 0)])
        assert [e["device"] for e in second.of("counted")] == ["kitchen"]
        assert [sorted(e["weights"]) for e in second.of("merged")] == [["desk", "kitchen"]]


def on_sending(device: LightDevice, first: Callable[[], object]) -> None:
    """Let something happen once, between the question for chunks and the answer."""
    send, left = device._sender.send_chunks, [first]

    def and_then(pending: Pending, wanted: Sequence[int]) -> None:
        if left:
            left.pop()()
        send(pending, wanted)

    device._sender.send_chunks = and_then  # type: ignore[method-assign]
