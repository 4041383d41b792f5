"""What a power cut costs: chunks on their way on the link, the tail of the outbox on the disk."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from edge_client.outbox import Outbox
from protocol.messages import UploadManifest, describe_file, upload_id
from tests.conftest import MOSQUITTO
from tests.faults.rows_power import power_cuts

ANYWHERE = 150


@pytest.mark.timeout(600)  # seconds where nobody else uses the machine: below 60
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_an_upload_that_is_cut_sends_at_most_a_window_and_a_chunk_again(tmp_path: Path) -> None:
    for row in power_cuts(tmp_path, seed=0, times=1, modules=80):
        assert row.good, row


def update(round_number: int) -> tuple[UploadManifest, bytes]:
    data = random.Random(round_number).randbytes(20_000)
    manifest = UploadManifest(
        job="small",
        device="kitchen",
        upload=upload_id("kitchen", "small", round_number),
        round=round_number,
        version=round_number,
        rank=2,
        rank_trained=2,
        held=2,
        encoding="f32",
        file=describe_file(data),
        examples=100,
    )
    return manifest, data


def whole(outbox: Outbox) -> dict[str, bytes]:
    """Return what waits in an outbox, with each file as its manifest announces it."""
    found = {}
    for upload in outbox.pending():
        pending = outbox.get(upload)
        assert pending is not None
        assert describe_file(pending.data) == pending.manifest.file
        found[upload] = pending.data
    return found


def test_an_outbox_cut_at_any_byte_of_its_log_holds_what_was_put_before(tmp_path: Path) -> None:
    live = tmp_path / "live"
    outbox = Outbox(live)
    log = live / "outbox.sqlite-wal"
    states: list[tuple[int, dict[str, bytes], int]] = []

    def note(trained: int) -> None:
        states.append((log.stat().st_size, whole(outbox), trained))

    note(0)
    for number in range(1, 7):
        manifest, data = update(number)
        outbox.put(manifest, data, rank=2)
        note(number)
        if number % 2:
            outbox.drop(manifest.upload)
            note(number)
    assert [size for size, _, _ in states] == sorted(size for size, _, _ in states)
    cuts = [size + more for size, _, _ in states for more in (-1, 0, 1)]
    first, last = states[0][0], states[-1][0]
    chance = random.Random(0)
    cuts += [chance.randint(first, last) for _ in range(ANYWHERE)]
    for number, cut in enumerate(c for c in cuts if first <= c <= last):
        copy = tmp_path / str(number)
        copy.mkdir()
        shutil.copy(live / "outbox.sqlite", copy)
        (copy / log.name).write_bytes(log.read_bytes()[:cut])
        reopened = Outbox(copy)
        _, waiting, trained = max((s for s in states if s[0] <= cut), key=lambda s: s[0])
        assert whole(reopened) == waiting, f"cut at byte {cut} of {last}"
        assert reopened.trained_round("small") == trained
        manifest, data = update(7)
        reopened.put(manifest, data, rank=2)
        assert whole(reopened) == {**waiting, manifest.upload: data}
        reopened.close()
        shutil.rmtree(copy)
    outbox.close()
