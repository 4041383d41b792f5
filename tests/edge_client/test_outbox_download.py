"""What a device must not forget, and what it downloads."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.download import Download, wanted_bands
from edge_client.errors import StorageError, WorkerError, WorkerKilled
from edge_client.outbox import Outbox
from edge_client.trainer.process import TrainingProcess
from protocol.adapter import Adapter, Factors, initial_adapter
from protocol.bands import Band, bands, cut, to_tensors
from protocol.chunks import split
from protocol.errors import BadChunk, BadTensors, MalformedMessage
from protocol.messages import (
    BaseModelInfo,
    GlobalManifest,
    Job,
    UploadManifest,
    describe_file,
    upload_id,
)
from protocol.tensors import encode

MODULES = {"q": (400, 300), "k": (5, 300)}


def make_job(**changed: Any) -> Job:
    base = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1000, modules=MODULES)
    fields = {"job": "notes", "base": base, "scale": 2.0, "ladder": [2, 8, 128]}
    return Job.model_validate({**fields, "encoding_down": "f32", **changed})


def manifest(round_number: int = 1, data: bytes = b"data") -> UploadManifest:
    return UploadManifest(
        job="notes", device="phone-1", upload=upload_id("phone-1", "notes", round_number),
        round=round_number, version=1, rank=2, rank_trained=4, held=8, encoding="f32",
        file=describe_file(data), examples=10,
    )  # fmt: skip


# -- the outbox --------------------------------------------------------------------------------


def test_an_update_waits_over_a_restart_until_it_is_dropped(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "state")
    assert outbox.pending() == []
    assert (outbox.rank("notes", 16), outbox.trained_round("notes")) == (16, 0)
    assert outbox.drawn_rows("notes") == 0
    for number in (3, 1, 2):
        outbox.put(manifest(number), b"data %d" % number, rank=8, drawn_rows=number * 10)
    outbox.close()
    outbox = Outbox(tmp_path / "state")
    assert outbox.pending() == [manifest(number).upload for number in (1, 2, 3)]
    found = outbox.get(manifest(2).upload)
    assert found is not None
    assert (found.manifest, found.data) == (manifest(2), b"data 2")
    assert outbox.rank("notes", 16) == 8
    assert outbox.rank("other", 16) == 16
    assert outbox.drawn_rows("notes") == 20
    assert outbox.drawn_rows("other") == 0
    outbox.drop(manifest(2).upload)
    outbox.drop(manifest(2).upload)
    assert outbox.get(manifest(2).upload) is None
    assert outbox.pending() == [manifest(1).upload, manifest(3).upload]
    assert outbox.pending("notes") == outbox.pending()
    assert outbox.pending("other") == [], "what waits of one job holds up no other"
    outbox.close()


def test_what_was_too_large_is_remembered_for_each_job(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert outbox.ceiling_mib("notes") == math.inf
    outbox.lower_ceiling("notes", 40.00001)
    outbox.close()
    outbox = Outbox(tmp_path)
    assert 39.99 < outbox.ceiling_mib("notes") <= 40.00001  # the same plan is not below it
    assert outbox.ceiling_mib("other") == math.inf
    outbox.close()


def test_the_same_update_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(manifest(), b"one", rank=8)
    outbox.put(manifest(), b"two", rank=4)
    assert len(outbox.pending()) == 1
    found = outbox.get(manifest().upload)
    assert found is not None
    assert found.data == b"two"
    assert (outbox.rank("notes", 16), outbox.trained_round("notes")) == (4, 1)
    outbox.close()


def test_what_was_put_is_on_disk_without_a_close(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(manifest(), b"data", rank=8)
    other = sqlite3.connect(tmp_path / "outbox.sqlite")  # as after a SIGKILL of the first
    assert other.execute("SELECT data FROM updates").fetchall() == [(b"data",)]
    other.close()
    outbox.close()


def test_every_start_has_a_larger_number_whatever_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 0
    for clock in (1.8e9, 1.8e9, 1.7e9, 1.9e9):
        monkeypatch.setattr("edge_client.outbox.time.time", lambda clock=clock: clock)
        outbox = Outbox(tmp_path)
        boot = outbox.next_boot()
        outbox.close()
        assert boot > last
        last = boot
    assert last == 1.9e9, "a copy of an older state counts from the clock"


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a folder that can be written to with --state"):
        Outbox(tmp_path / "file")


# -- downloads ---------------------------------------------------------------------------------


def published(job: Job) -> tuple[Adapter, GlobalManifest, dict[Band, bytes]]:
    start = initial_adapter(MODULES, job.rank, job.scale, 0)
    rng = np.random.default_rng(1)
    adapter = Adapter(
        {
            n: Factors(f.a, rng.standard_normal(f.b.shape).astype(np.float32))
            for n, f in start.layers.items()
        },
        job.scale,
    )
    files = {b: encode(to_tensors(cut(adapter, b)), job.encoding_down) for b in bands(job.ladder)}
    announced = {band.name: describe_file(data) for band, data in files.items()}
    return (
        adapter,
        GlobalManifest(
            job=job.job, version=4, parent=3, encoding=job.encoding_down, bands=announced
        ),
        files,
    )


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_the_bands_come_together_as_the_head_of_the_adapter(wanted: int) -> None:
    job = make_job()
    adapter, announced, files = published(job)
    every = bands(job.ladder)
    download = Download(job, announced, every[:wanted])
    pieces = [(b, i, c) for b in every for i, c in enumerate(split(files[b]))]
    assert len(pieces) > len(every)
    for band, index, chunk in reversed(pieces):
        assert not download.complete
        download.add(band, index, chunk)
        download.add(band, index, chunk)
    assert download.complete
    assert download.held == every[wanted - 1].stop
    for name, factors in download.adapter().layers.items():
        expected = adapter.truncated(download.held).layers[name]
        np.testing.assert_array_equal(factors.a, expected.a)
        np.testing.assert_array_equal(factors.b, expected.b)


def test_a_bad_chunk_is_refused_and_the_good_one_still_taken() -> None:
    job = make_job()
    _, announced, files = published(job)
    band = Band(0, 2)
    download = Download(job, announced, [band])
    good = files[band]
    for index, chunk in [(0, good[:-1] + b"!"), (0, good[:-1]), (1, good), (-1, good), (0, b"")]:
        with pytest.raises(BadChunk):
            download.add(band, index, chunk)
    assert not download.complete
    download.add(Band(2, 8), 0, b"whatever: it is not wanted")
    download.add(band, 0, good)
    assert download.complete


def test_a_version_that_announces_what_it_is_not() -> None:
    job = make_job()
    _, announced, files = published(job)
    band = Band(0, 2)
    wrong = announced.bands[band.name].model_copy(update={"sha256": "0" * 64})
    lying = announced.model_copy(update={"bands": {**announced.bands, band.name: wrong}})
    download = Download(job, lying, [band])
    download.add(band, 0, files[band])
    with pytest.raises(BadChunk):
        download.adapter()
    garbage = {**announced.bands, band.name: describe_file(b"garbage")}
    download = Download(job, announced.model_copy(update={"bands": garbage}), [band])
    download.add(band, 0, b"garbage")
    with pytest.raises(BadTensors):
        download.adapter()


def test_bands_of_another_ladder_or_job_are_refused() -> None:
    job = make_job()
    _, announced, _ = published(job)
    with pytest.raises(MalformedMessage):
        Download(make_job(ladder=[2, 4, 128]), announced, [])
    with pytest.raises(MalformedMessage):
        Download(make_job(job="other"), announced, [])


@pytest.mark.parametrize(
    ("rank", "held", "budget", "stop"),
    [
        (2, 128, 1e12, 128),
        (2, 8, 1e12, 8),
        (2, 128, 0, 2),
        (8, 2, 0, 8),  # never fewer than the rank needs
        (2, 128, 4 * 8 * 1100, 8),
        (128, 128, 0, 128),
    ],
)
def test_which_bands_are_wanted(rank: int, held: int, budget: float, stop: int) -> None:
    frozen = wanted_bands(make_job(), rank=rank, held=held, byte_budget=budget)
    assert frozen[0].start == 0
    assert frozen[-1].stop == stop
    dropped = make_job(remainder="dropped", directions="top")
    assert wanted_bands(dropped, rank=rank, held=held, byte_budget=1e12)[-1].stop == rank


# -- the training process ----------------------------------------------------------------------


def test_a_killed_training_process_is_an_error_that_names_the_signal() -> None:
    with TrainingProcess() as process:
        assert process.call("memory")[0] == 0.0
        with pytest.raises(WorkerError, match="failed in evaluate"):
            process.call("evaluate", split="train")
        pid = process._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerKilled, match="signal 9"):
            process.call("memory")
