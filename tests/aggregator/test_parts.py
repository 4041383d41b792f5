"""Uploads on the disk of an aggregator that ends at any point: rows say no more than files have."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.chunks import split
from protocol.tensors import encode
from tests.aggregator.uploading import Aggregator, make_job, update


class PowerCut(Exception):
    """The end of a transaction before it is committed."""


@pytest.fixture
def aggregator(tmp_path: Path) -> Aggregator:
    made = Aggregator(tmp_path / "state", make_job())
    made.greet()
    return made


@pytest.mark.parametrize("together", [1, 2])
def test_a_batch_that_is_cut_off_is_asked_for_again(aggregator: Aggregator, together: int) -> None:
    """The last chunks of an upload come with its being counted, and all of it is undone."""
    data = encode(update(aggregator.job), "f32")
    manifest, chunks = aggregator.manifest(data), split(data)
    aggregator.offer(manifest)
    for index in range(len(chunks) - together):
        aggregator.chunk(manifest, index, chunks[index])

    def last_batch() -> None:
        with aggregator.store.transaction():
            for index in range(len(chunks) - together, len(chunks)):
                answers = aggregator.chunk(manifest, index, chunks[index])
            assert [a.kind for a in answers] == ["done"]
            raise PowerCut

    with pytest.raises(PowerCut):
        last_batch()
    aggregator.reopen()
    assert aggregator.counted() == []
    assert len(aggregator.store.uploads.missing_chunks(manifest)) == together
    assert [a.kind for a in aggregator.deliver(manifest, data)] == ["done"]
    assert aggregator.store.uploads.file(manifest).read_bytes() == data
    assert list(aggregator.store.uploads.parts_folder.iterdir()) == []


def test_a_counted_update_gets_its_name_at_the_next_start(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(update(aggregator.job), "f32")
    manifest = aggregator.manifest(data)
    with monkeypatch.context() as patch:
        # Cut off between the commit and the rename.
        patch.setattr(aggregator.store._db, "_after_commit", lambda: None)
        aggregator.deliver(manifest, data)
    assert not aggregator.store.uploads.file(manifest).exists()
    aggregator.reopen()
    assert aggregator.counted() == [manifest]
    assert aggregator.store.uploads.file(manifest).read_bytes() == data


def test_other_bytes_of_the_same_upload_begin_at_nothing(aggregator: Aggregator) -> None:
    first, second = (encode(update(aggregator.job, size), "f32") for size in (0.01, 0.02))
    before, after = aggregator.manifest(first), aggregator.manifest(second)
    aggregator.offer(before)
    aggregator.chunk(before, 0, split(first)[0])
    assert [a.kind for a in aggregator.deliver(after, second)] == ["done"]
    assert aggregator.store.uploads.file(after).read_bytes() == second
    assert list(aggregator.store.uploads.parts_folder.iterdir()) == []
