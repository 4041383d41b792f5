"""Uploads of a part of the modules: taken where the job allows them, checked, and merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aggregator.merge import RoundView, merge
from aggregator.store import Store
from aggregator.updates import read_update, upload_stacks
from aggregator.versions import Versions
from protocol.layers import to_bitmap
from protocol.tensors import encode
from tests.aggregator.uploading import MODULES, Aggregator, make_job

Q, K = "model.layers.0.q", "model.layers.0.k"
ONLY_Q = to_bitmap(MODULES, {Q})


@pytest.fixture
def aggregator(tmp_path: Path) -> Aggregator:
    made = Aggregator(tmp_path, make_job(layers="fit"))
    made.greet()
    return made


def tensors(aggregator: Aggregator, modules: str | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    manifest = aggregator.manifest(b"", modules=modules)
    return {
        s.name: rng.standard_normal(s.shape).astype(np.float32) / 100
        for s in upload_stacks(aggregator.job, manifest)
    }


def test_an_update_of_one_module_leaves_the_other_to_the_previous_global(
    aggregator: Aggregator,
) -> None:
    found = tensors(aggregator, ONLY_Q)
    assert sorted(found) == ["A.64x260", "B.300x64"]
    data = encode(found, "f32")
    manifest = aggregator.manifest(data, modules=ONLY_Q)
    assert [a.kind for a in aggregator.deliver(manifest, data)] == ["done"]
    versions = Versions(aggregator.job, Store(aggregator.folder))
    sent = read_update(aggregator.job, versions, manifest, data)
    assert {name: f.rank for name, f in sent.adapter.layers.items()} == {Q: 64, K: 0}
    previous = versions.load(1)
    for rule in ("anchored", "segment"):
        view = RoundView(previous, [sent], MODULES, aggregator.job.rank, 0)
        merged = merge(rule, view).adapter.layers
        assert np.abs(merged[Q].b @ merged[Q].a).max() > 0
        assert np.abs(merged[K].b @ merged[K].a).max() == 0


@pytest.mark.parametrize(
    ("modules", "why"),
    [("0", "no bit set"), ("80f", "3 hex digits, 2 take 1"), ("1", "one beyond the 2")],
)
def test_modules_that_the_job_has_not_are_refused(
    aggregator: Aggregator, modules: str, why: str
) -> None:
    (answer,) = aggregator.offer(aggregator.manifest(b"x", modules=modules))
    assert (answer.kind, why in answer.reason) == ("reject", True)


def test_a_job_that_trains_all_blocks_takes_no_part_of_them(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, make_job())
    aggregator.greet()
    (answer,) = aggregator.offer(aggregator.manifest(b"x", modules=ONLY_Q))
    assert answer.kind == "reject"
    assert answer.reason == "it has some modules only, this job trains all"


def test_tensors_of_a_module_that_was_not_named_are_refused(aggregator: Aggregator) -> None:
    data = encode(tensors(aggregator, None), "f32")
    (answer,) = aggregator.deliver(aggregator.manifest(data, modules=ONLY_Q), data)
    assert answer.kind == "reject"
    assert "is not part of this job and rank" in answer.reason
