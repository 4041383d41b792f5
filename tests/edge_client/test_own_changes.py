"""A device's own changes: summed as products, each round once, and added as far as it helps."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edge_client.download import Source
from edge_client.errors import StorageError
from edge_client.holding import Holding
from edge_client.learning import Learned
from edge_client.own_changes import SHARES, OwnChanges, best_share, summed, with_share
from edge_client.result import settle
from edge_client.trainer.base import TrainReport
from protocol.adapter import Adapter, Factors, module_rank
from protocol.messages import BaseModelInfo, GlobalManifest, Job

MODULES = {"l.0.q": (6, 5), "l.0.k": (2, 5)}
RANK = 4


def job(rule: str = "trust-weights", rank: int = RANK) -> Job:
    return Job(
        job="notes",
        base=BaseModelInfo(name="toy", sha256="0" * 64, parameters=1, modules=MODULES),
        scale=2.0,
        ladder=[2, rank],
        rounds=10,
        rule=rule,
    )


JOB = job()


def drawn(seed: int, rank: int = RANK) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {}
    for name, (d_out, d_in) in MODULES.items():
        r = module_rank((d_out, d_in), rank)
        shapes = ((r, d_in), (d_out, r))
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        layers[name] = Factors(a, b)
    return Adapter(layers, JOB.scale)


def product(adapter: Adapter, name: str) -> np.ndarray:
    factors = adapter.layers[name]
    return np.asarray(adapter.scale * factors.b.astype(float) @ factors.a.astype(float))


def learned(seed: int, directions: tuple[int, ...] = (1, 3)) -> Learned:
    at = {
        name: np.array([d for d in directions if d < min(RANK, *shape)], np.intp)
        for name, shape in MODULES.items()
    }
    whole = drawn(seed)
    change = Adapter({n: f.take(at[n]) for n, f in whole.layers.items()}, whole.scale)
    return Learned(change, 2, 2, 0.0, 0.0, TrainReport(1, 10, 2.0, 0.0), RANK, at)


def changed(held: Adapter, what: Learned, name: str) -> np.ndarray:
    """Return what a round changed of a product, densely."""
    factors, at = held.layers[name], what.directions[name]
    a, b = factors.a.astype(float), factors.b.astype(float)
    a[at] += what.change.layers[name].a
    b[:, at] += what.change.layers[name].b
    return np.asarray(held.scale * b @ a - product(held, name))


@pytest.mark.parametrize("name", MODULES)
def test_the_sum_is_the_best_form_of_the_dense_sum_of_products(name: str) -> None:
    before, first, second = drawn(0), drawn(1), drawn(2)
    total = summed(summed(None, first, before, JOB), second, first, JOB)
    dense = product(second, name) - product(before, name)
    assert total.layers[name].rank == min(RANK, *MODULES[name])
    # Of two sums that are cut in turn only the last is the best one: here nothing is lost before.
    once = summed(None, second, before, JOB)
    sigma = np.linalg.svd(dense, compute_uv=False)
    left_out = np.sqrt((sigma[once.layers[name].rank :] ** 2).sum())
    assert np.linalg.norm(product(once, name) - dense) == pytest.approx(left_out, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_is_added_to_the_product_at_the_rank_that_is_held(share: float) -> None:
    for rank in (RANK, 2):
        adapter, total = drawn(3, rank), drawn(4)
        found = with_share(adapter, total, share, JOB)
        for name in MODULES:
            dense = product(adapter, name) + share * product(total, name)
            kept = found.layers[name].rank
            assert kept == adapter.layers[name].rank
            sigma = np.linalg.svd(dense, compute_uv=False)
            left_out = np.sqrt((sigma[kept:] ** 2).sum())
            assert np.linalg.norm(product(found, name) - dense) == pytest.approx(left_out, abs=1e-4)


def test_each_round_counts_once_also_where_it_is_done_again(tmp_path: Path) -> None:
    own, held = OwnChanges(job(rank=5), tmp_path), drawn(0)
    assert own.total() is None
    own.note(1, held, learned(1))
    own.note(2, held, learned(7, (0, 2)))  # killed before it was sent
    OwnChanges(job(rank=5), tmp_path).note(2, held, learned(2, (0, 2)))
    total = OwnChanges(job(rank=5), tmp_path).total()
    assert total is not None
    for name in MODULES:
        wanted = changed(held, learned(1), name) + changed(held, learned(2, (0, 2)), name)
        np.testing.assert_allclose(product(total, name), wanted, atol=1e-4)
    own.note(5, held, learned(3))
    kept = sorted(path.name for path in (tmp_path / "own-changes").iterdir())
    assert kept == ["notes.r5.round2.safetensors", "notes.r5.round5.safetensors"]
    assert all(
        stat.S_IMODE(p.stat().st_mode) == 0o600 for p in (tmp_path / "own-changes").iterdir()
    )


def test_a_damaged_sum_is_said_in_one_line(tmp_path: Path) -> None:
    OwnChanges(JOB, tmp_path).note(1, drawn(0), learned(1))
    (kept,) = (tmp_path / "own-changes").iterdir()
    kept.write_bytes(b"not a tensor")
    with pytest.raises(StorageError, match=r"own changes in .*round1\.safetensors is damaged"):
        OwnChanges(JOB, tmp_path).total()


@pytest.mark.parametrize("best", [0.0, *SHARES])
def test_the_share_is_the_one_that_does_best(best: float) -> None:
    adapter, total = drawn(3), drawn(4)
    wanted = {share: product(with_share(adapter, total, share, JOB), "l.0.q") for share in SHARES}

    def loss(tried: Adapter) -> float:
        found = product(tried, "l.0.q")
        near = {share: float(np.abs(found - one).max()) for share, one in wanted.items()}
        share = min(near, key=near.__getitem__) if tried is not adapter else 0.0
        return 1.0 + abs(share - best)

    found, share = best_share(loss, adapter, total, JOB)
    assert share == best
    assert (found is adapter) == (best == 0.0)


def test_a_share_without_a_finite_loss_is_left_out() -> None:
    adapter = drawn(3)
    found, share = best_share(
        lambda tried: 1.0 if tried is adapter else math.nan, adapter, drawn(4), JOB
    )
    assert found is adapter and share == 0.0


class Nearness:
    """Have a loss for an adapter: how far its product is from that of the one wanted."""

    def __init__(self, wanted: np.ndarray) -> None:
        self._wanted = wanted

    def evaluate(self, adapter: Adapter, split: str) -> float:
        assert split == "trust"
        return float(np.linalg.norm(product(adapter, "l.0.q") - self._wanted))


def ending(of: Job, common: Adapter | None) -> Holding:
    heading = GlobalManifest.model_construct(version=3, personal={})
    source = Source("notes", "desk", "personal", 3)
    return Holding(of, "desk", heading, 3, source, drawn(0), common=common)


@pytest.mark.parametrize("with_common", [True, False])
def test_a_device_ends_with_more_of_its_own(tmp_path: Path, with_common: bool) -> None:
    own = OwnChanges(JOB, tmp_path)
    own.note(1, drawn(0), learned(1))
    total = own.total()
    assert total is not None
    wanted = product(with_share(drawn(0), total, 0.2, JOB), "l.0.q")
    held = ending(JOB, drawn(9) if with_common else None)
    assert settle(cast("Any", Nearness(wanted)), held, own) == 0.2
    assert held.adapter is not None and held.common is not None
    np.testing.assert_allclose(product(held.adapter, "l.0.q"), wanted, atol=1e-4)
    # Where its adapter was the common one, that is kept beside it.
    np.testing.assert_array_equal(
        product(held.common, "l.0.q"), product(drawn(9 if with_common else 0), "l.0.q")
    )


def test_what_all_share_stays_as_it_is(tmp_path: Path) -> None:
    """Of a rule without personal adapters, and where there is nothing of its own."""
    own = OwnChanges(JOB, tmp_path)
    held = ending(JOB, None)
    assert settle(cast("Any", Nearness(np.zeros((6, 5)))), held, own) == 0.0
    assert held.common is None
    own.note(1, drawn(0), learned(1))
    held = ending(job("anchored"), None)
    assert settle(cast("Any", Nearness(np.zeros((6, 5)))), held, own) == 0.0
    assert held.adapter is not None
    np.testing.assert_array_equal(product(held.adapter, "l.0.q"), product(drawn(0), "l.0.q"))
