"""The exact identities of docs/algorithms.md, one test each, by their numbers there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import RULES, RoundView, Update, merge
from aggregator.merge.combine import Contribution, LayerUpdates, factor_average
from aggregator.merge.lowrank import gram, inner, norm, truncate
from aggregator.merge.sums import Term
from aggregator.merge.trust import (
    cosine_scores,
    personal,
    prediction_distance,
    prediction_scores,
    softmax_rows,
)
from protocol.adapter import Adapter, Factors, initial_adapter, module_rank
from protocol.probe import TopLogits

Dense = npt.NDArray[np.float64]
SCALE = 2.0
PRODUCTS = ["flexlora", "flora"]
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 14)
ranks = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def draw(rng: np.random.Generator, d_out: int, d_in: int, rank: int) -> Factors:
    a = rng.standard_normal((rank, d_in)).astype(np.float32)
    return Factors(a, rng.standard_normal((d_out, rank)).astype(np.float32))


def top(factors: Factors, device: str, examples: int = 1) -> Update:
    """An update of one module that trained the first directions."""
    adapter = Adapter({"m": factors}, SCALE)
    return Update(device, adapter, {"m": np.arange(factors.rank)}, examples, {})


def view_of(updates: list[Update], shape: tuple[int, int], rank: int, seed: int = 0) -> RoundView:
    previous = initial_adapter({"m": shape}, rank, SCALE, seed)
    return RoundView(previous, updates, {"m": shape}, rank, seed)


def delta(adapter: Adapter) -> Dense:
    f = adapter.layers["m"]
    return adapter.scale * f.b.astype(np.float64) @ f.a.astype(np.float64)


def random_view(seed: int, device_ranks: list[int], d_out: int, d_in: int) -> RoundView:
    rng, rank = np.random.default_rng(seed), max(device_ranks)
    updates = [
        top(draw(rng, d_out, d_in, module_rank((d_out, d_in), r)), f"d{k}", 1 + k)
        for k, r in enumerate(device_ranks)
    ]
    return view_of(updates, (d_out, d_in), rank, seed % 1000)


def assert_close(ours: Dense, theirs: Dense, size: float) -> None:
    """Compare to float32 rounding of factors whose product has the norm `size`."""
    assert np.linalg.norm(ours - theirs) <= 3e-6 * max(size, 1e-30)


@given(seed=seeds, count=st.integers(1, 6), rank=st.integers(1, 5), d_out=sizes, d_in=sizes)
@quick
def test_identity_1_residual_of_the_factor_average(
    seed: int, count: int, rank: int, d_out: int, d_in: int
) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, d_out, d_in)
    p = rng.dirichlet(np.ones(count))
    f = [draw(rng, d_out, d_in, rank) for _ in range(count)]
    at = np.arange(rank)
    parts = tuple(Contribution(x, at, np.full(rank, w), SCALE) for x, w in zip(f, p, strict=True))
    result = factor_average(LayerUpdates((d_out, d_in), rank, SCALE, parts, "left", 0))
    mean_a = sum(w * x.a for w, x in zip(p, f, strict=True))
    mean_b = sum(w * x.b for w, x in zip(p, f, strict=True))
    mean_product = sum(w * x.b.astype(float) @ x.a for w, x in zip(p, f, strict=True))
    spread = sum(w * (x.b - mean_b) @ (x.a - mean_a) for w, x in zip(p, f, strict=True))
    np.testing.assert_allclose(
        mean_product - result.factors.b @ result.factors.a, spread, atol=1e-6
    )
    wanted = SCALE * np.linalg.norm(spread)
    assert result.residual == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@given(seed=seeds, device_ranks=ranks)
@quick
def test_identity_2_rotations_change_factor_averages_alone(
    seed: int, device_ranks: list[int]
) -> None:
    device_ranks = [r + 1 for r in device_ranks]
    view = random_view(seed, device_ranks, 12, 10)
    rng = np.random.default_rng(seed)
    rotated = []
    for u in view.updates:
        f = u.adapter.layers["m"]
        q = np.linalg.qr(rng.standard_normal((f.rank, f.rank)))[0]
        turned = Factors((q.T @ f.a).astype(np.float32), (f.b @ q).astype(np.float32))
        rotated.append(replace(u, adapter=Adapter({"m": turned}, SCALE)))
    turned_view = replace(view, updates=rotated)
    for rule in PRODUCTS:
        one, other = (delta(merge(rule, v).adapter) for v in (view, turned_view))
        wide = replace(view, rank=10, previous=initial_adapter(view.shapes, 10, SCALE, 0))
        whole = delta(merge(rule, wide).adapter)
        assert np.linalg.norm(whole - one) == pytest.approx(  # the truncation may be degenerate
            np.linalg.norm(whole - other), rel=1e-4, abs=1e-4
        )
        exact = delta(merge(rule, replace(wide, updates=rotated)).adapter)
        assert_close(exact, whole, 10 * float(np.linalg.norm(whole)))
    for rule in ("fedavg", "hetlora"):
        one, other = (delta(merge(rule, v).adapter) for v in (view, turned_view))
        assert np.linalg.norm(one - other) > 1e-3 * np.linalg.norm(one)


@given(seed=seeds, device_ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5))
@quick
def test_identity_3_traces_equal_dense_norms_and_inner_products(
    seed: int, device_ranks: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"wide": (5, 9), "tall": (11, 3), "row": (1, 7)}
    adapters = [
        Adapter({n: draw(rng, *s, r) for n, s in shapes.items()}, float(rng.uniform(0.5, 3)))
        for r in device_ranks
    ]
    deltas = [
        np.concatenate(
            [(a.scale * f.b.astype(float) @ f.a.astype(float)).ravel() for f in a.layers.values()]
        )
        for a in adapters
    ]
    np.testing.assert_allclose(gram(adapters), np.array(deltas) @ np.array(deltas).T, atol=1e-9)
    left, right = adapters[0].layers["wide"], adapters[-1].layers["wide"]
    dense = [f.b.astype(float) @ f.a.astype(float) for f in (left, right)]
    assert inner(left, right) == pytest.approx(float(np.sum(dense[0] * dense[1])), abs=1e-9)
    assert norm(left) == pytest.approx(float(np.linalg.norm(dense[0])), abs=1e-6)


@given(
    seed=seeds,
    device_ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    d_out=sizes,
    d_in=sizes,
    rank=st.integers(1, 8),
    split=st.sampled_from(["left", "balanced"]),
)
@settings(max_examples=80, deadline=None)
def test_identity_4_truncation_equals_dense_svd(
    seed: int, device_ranks: list[int], d_out: int, d_in: int, rank: int, split: str
) -> None:
    rng, rank = np.random.default_rng(seed), min(rank, d_out, d_in)
    terms = [
        Term(draw(rng, d_out, d_in, r), rng.uniform(0, 2, r).astype(np.float64))
        for r in device_ranks
    ]
    dense = np.zeros((d_out, d_in))
    for t in terms:
        dense += t.read().b.astype(float) @ np.diag(t.weights) @ t.read().a
    values = np.linalg.svd(dense, compute_uv=False)
    size = float(np.linalg.norm(dense))
    result = truncate(
        terms, (d_out, d_in), rank, scale=3.0, split="left" if split == "left" else "balanced"
    )
    f = result.factors
    assert (f.a.shape, f.b.shape) == ((rank, d_in), (d_out, rank))
    error = np.linalg.norm(dense - 3.0 * f.b @ f.a)
    tail = np.sqrt(np.sum(values[rank:] ** 2))
    assert error == pytest.approx(tail, abs=2e-7 * size)
    assert result.residual == pytest.approx(tail, abs=2e-7 * size)
    assert result.norm == pytest.approx(size, rel=1e-9)
    np.testing.assert_allclose(result.singular_values, values[:rank], atol=2e-7 * size)
    if split == "left":
        np.testing.assert_allclose(f.a @ f.a.T, np.eye(rank), atol=1e-9)
    else:  # where both carry √(Σ/s), their Grams are equal
        live = f.b.any(axis=0)
        gram_a, gram_b = f.a[live] @ f.a[live].T, f.b[:, live].T @ f.b[:, live]
        np.testing.assert_allclose(gram_a, gram_b, atol=1e-6 * size)
    live = f.b.any(axis=0)
    largest = np.abs(f.a[live]).argmax(axis=1)
    assert (f.a[live][np.arange(int(live.sum())), largest] > 0).all()


@given(seed=seeds, device_ranks=ranks, rule=st.sampled_from(PRODUCTS))
@quick
def test_identity_5_a_device_at_another_rank_with_the_same_delta(
    seed: int, device_ranks: list[int], rule: str
) -> None:
    view = random_view(seed, device_ranks, 30, 32)
    rank = 30
    view = replace(view, rank=rank, previous=initial_adapter(view.shapes, rank, SCALE, 0))
    changed = []
    for u in view.updates:  # twice as many directions, each half of what it was
        f = u.adapter.layers["m"]
        double = Factors(np.concatenate([f.a, f.a]), np.concatenate([f.b, f.b], axis=1) / 2)
        changed.append(
            replace(
                u, adapter=Adapter({"m": double}, SCALE), directions={"m": np.arange(2 * f.rank)}
            )
        )
    one = merge(rule, view).adapter
    other = merge(rule, replace(view, updates=changed)).adapter
    assert_close(delta(one), delta(other), float(np.linalg.norm(delta(one))))


@given(seed=seeds, rank=st.integers(1, 5), count=st.integers(1, 5), d_out=sizes, d_in=sizes)
@quick
def test_identity_6_no_op_permutation_and_one_device(
    seed: int, rank: int, count: int, d_out: int, d_in: int
) -> None:
    rng = np.random.default_rng(seed)
    held = module_rank((d_out, d_in), rank)
    same = draw(rng, d_out, d_in, held)
    view = view_of([top(same, f"d{k}", k + 1) for k in range(count)], (d_out, d_in), rank)
    wanted = delta(view.updates[0].adapter)
    for rule in RULES:
        merged = merge(rule, view)
        assert_close(delta(merged.adapter), wanted, float(np.linalg.norm(wanted)))
        assert merged.residual < 1e-6
    for result in personal(view, np.full((count, count), 1 / count)):
        assert_close(delta(result), wanted, float(np.linalg.norm(wanted)))

    unlike = random_view(seed, [int(r) for r in rng.integers(1, 6, count)], 9, 8)
    order = rng.permutation(count)
    shuffled = replace(unlike, updates=[unlike.updates[i] for i in order])
    for rule in RULES:
        one, other = merge(rule, unlike), merge(rule, shuffled)
        assert one.weights == pytest.approx(other.weights)
        assert one.residual == pytest.approx(other.residual, abs=1e-6)
        size = float(np.linalg.norm(delta(one.adapter)))
        assert_close(delta(one.adapter), delta(other.adapter), 10 * size)

    single = [unlike.updates[0].adapter]
    probe = TopLogits(np.arange(4).reshape(2, 2), np.ones((2, 2)))
    for scores in (
        cosine_scores(gram(single)),
        prediction_scores(prediction_distance([probe])),
    ):
        assert softmax_rows(scores).tolist() == [[1.0]]


@given(seed=seeds, in_domain=st.integers(1, 4), temperature=st.floats(1e-3, 1e3))
@quick
def test_identity_7_trust_rows(seed: int, in_domain: int, temperature: float) -> None:
    rng, count = np.random.default_rng(seed), 2 * in_domain
    for scores in (
        cosine_scores(gram([Adapter({"m": draw(rng, 6, 5, 2)}, SCALE) for _ in range(count)])),
        -rng.uniform(0, 8, (count, count)),  # minus losses
    ):
        rows = softmax_rows(scores, temperature)
        assert (rows >= 0).all()
        np.testing.assert_allclose(rows.sum(axis=1), 1.0)

    domains = np.repeat([0, 1], in_domain)
    shared = rng.uniform(5, 10, (2, 16, 8))  # a domain's logits (positions, k), tokens its own
    probes = [
        TopLogits(
            1000 * d + np.tile(np.arange(8), (16, 1)),
            shared[d] + rng.uniform(-0.1, 0.1, (16, 8)),
        )
        for d in domains
    ]
    rows = softmax_rows(prediction_scores(prediction_distance(probes)))
    np.testing.assert_allclose(rows.sum(axis=1), 1.0)
    inside = domains[:, None] == domains[None, :]
    for row, mine in zip(rows, inside, strict=True):
        assert row[mine].min() > row[~mine].max()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("fedavg", 9.765625e-4), ("flexlora", 3.125e-2), ("segment", 1.0), ("anchored", 1.0)],
)
def test_identity_8_dilution_with_no_training(rule: str, kept: float) -> None:
    assert np.isclose(kept, {"fedavg": 9.8e-4, "flexlora": 3.1e-2}.get(rule, 1.0), rtol=1e-2)
    shape, rank, fleet = (40, 32), 16, [4, 4, 8, 16]
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.standard_normal((32, rank)))[0].T.astype(np.float32)
    left = np.linalg.qr(rng.standard_normal((40, rank)))[0]
    # far enough apart that the order of the directions survives being scaled down
    b = (left * 100.0 ** -(np.arange(rank) ** 0.5)).astype(np.float32)
    current = Adapter({"m": Factors(a, b)}, SCALE)
    u, v = left[:, 6], a[6].astype(np.float64)
    first = float(u @ delta(current) @ v)
    for _ in range(5):
        updates = []
        for k, r in enumerate(fleet):
            part = current.truncated(r)
            updates.append(Update(f"d{k}", part, {"m": np.arange(r)}, 1, {}))
        current = merge(rule, RoundView(current, updates, {"m": shape}, rank, 0)).adapter
    assert float(u @ delta(current) @ v) / first == pytest.approx(kept, rel=1e-3)


@given(seed=seeds, device_ranks=ranks)
@quick
def test_identity_9_stack_before_compression_is_exact(seed: int, device_ranks: list[int]) -> None:
    view = random_view(seed, device_ranks, 7, 9)
    share = np.array([u.examples for u in view.updates]) / sum(u.examples for u in view.updates)
    layers = [u.adapter.layers["m"] for u in view.updates]
    exact = Factors(
        np.concatenate([f.a.astype(np.float64) for f in layers]),
        np.concatenate([p * f.b for f, p in zip(layers, share, strict=True)], axis=1),
    )
    assert exact.rank == sum(f.rank for f in layers)
    wanted = sum(p * delta(u.adapter) for p, u in zip(share, view.updates, strict=True))
    np.testing.assert_allclose(SCALE * exact.b @ exact.a, wanted, rtol=1e-12, atol=1e-12)
    wide = replace(view, rank=7, previous=initial_adapter(view.shapes, 7, SCALE, 0))
    compressed = merge("flora", wide).adapter
    assert_close(delta(compressed), wanted, float(np.linalg.norm(wanted)))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"fedavg", "hetlora", "krum"}))
@pytest.mark.parametrize(("shape", "rank"), [((40, 50), 8), ((3, 12), 8), ((700, 600), 64)])
def test_devices_that_cancel_leave_nothing_and_what_can_learn(
    rule: str, shape: tuple[int, int], rank: int
) -> None:
    rng, updates = np.random.default_rng(1), []
    device_rank = min(rank, *shape) // 2 or 1
    for k in range(12 if min(shape) > 512 else 3):  # enough of the large ones for passes
        f = draw(rng, *shape, device_rank if min(shape) < 512 else rank)
        updates += [top(f, f"d{k} with"), top(Factors(f.a, -f.b), f"d{k} against")]
    view = view_of(updates, shape, rank)
    for seen in (view, replace(view, updates=updates[::-1])):
        merged = merge(rule, seen)
        assert merged.residual == 0 and not delta(merged.adapter).any()
        lengths = np.linalg.norm(merged.adapter.layers["m"].a, axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
