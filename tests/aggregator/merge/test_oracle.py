"""Every rule against a dense float64 oracle that shares no code with it, and its guards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aggregator.merge.rules as rules_module
from aggregator.errors import AggregatorError, BadRuleSettings, MergeError, UnknownRule
from aggregator.merge import RULES, Merged, RoundView, Update, merge
from aggregator.merge.lowrank import Term, dense_sum, module_seed, revived, truncate
from aggregator.merge.round_view import completed
from aggregator.merge.trust import (
    TopLogits,
    cosine_scores,
    personal,
    prediction_distance,
    prediction_scores,
    softmax_rows,
    validation_scores,
)
from protocol.adapter import Adapter, Factors, Shapes, directions, initial_adapter, module_rank

Dense = npt.NDArray[np.float64]
SHAPES: Shapes = {
    "square": (10, 10),
    "wide": (6, 21),
    "tall": (19, 7),
    "narrow": (3, 12),  # narrower than the rank
    "row": (1, 9),
    "column": (8, 1),
}


def draw(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> Factors:
    d_out, d_in = shape
    return Factors(
        rng.standard_normal((rank, d_in)).astype(np.float32),
        rng.standard_normal((d_out, rank)).astype(np.float32),
    )


@st.composite
def rounds(drawn: st.DrawFn) -> RoundView:
    """Rounds of unequal ranks, scales and directions, with zero and duplicate devices."""
    rng = np.random.default_rng(drawn(st.integers(0, 2**32 - 1)))
    rank, mode = drawn(st.integers(1, 8)), drawn(st.sampled_from(["top", "rotating"]))
    shapes = {n: SHAPES[n] for n in drawn(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1))}
    scale = drawn(st.sampled_from([0.25, 1.0, 2.0]))
    held = {n: module_rank(s, rank) for n, s in shapes.items()}
    previous = Adapter({n: draw(rng, s, held[n]) for n, s in shapes.items()}, scale)
    updates: list[Update] = []
    for k in range(drawn(st.integers(1, 5))):
        kind = drawn(st.sampled_from(["own", "own", "own", "zero", "duplicate", "tiny", "flat"]))
        if kind == "duplicate" and updates:
            updates.append(replace(updates[-1], device=f"d{k}"))
            continue
        device_rank = 0 if kind == "flat" else drawn(st.integers(1, rank))
        at = {
            n: np.array(
                directions(
                    mode, job="j", device=f"d{k}", round_number=3, rank=device_rank, held=held[n]
                ),
                np.intp,
            )
            for n in shapes
        }
        size = np.float32({"zero": 0.0, "tiny": 1e-6}.get(kind, 1.0))
        layers = {
            n: Factors((f := draw(rng, s, len(at[n]))).a, f.b * size) for n, s in shapes.items()
        }
        own_scale = drawn(st.sampled_from([scale, scale, 0.5]))
        examples = drawn(st.integers(0 if k else 1, 50))
        updates.append(Update(f"d{k}", Adapter(layers, own_scale), at, examples, {}))
    return RoundView(previous, updates, shapes, rank, 7)


# ---- the oracle ------------------------------------------------------------------------------


def dense(factors: Factors, scale: float) -> Dense:
    product: Dense = scale * factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return product


def best(matrix: Dense, rank: int) -> Dense:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    cut: Dense = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return cut


def oracle_sum(rule: str, view: RoundView, module: str) -> tuple[Dense, Dense | None]:
    """Return the weighted sum of deltas of a rule, and the factor-averaged delta if it has one."""
    counts = np.array([float(u.examples) for u in view.updates])
    p = counts / counts.sum()
    if rule == "hetlora":
        norms = np.array(
            [
                np.sqrt(
                    sum(
                        np.linalg.norm(dense(f, u.adapter.scale)) ** 2
                        for f in u.adapter.layers.values()
                    )
                )
                for u in view.updates
            ]
        )
        p = norms / norms.sum() if norms.any() else np.full(len(norms), 1 / len(norms))
    shape, previous = view.shapes[module], view.previous.layers[module]
    total, a, b = np.zeros(shape), np.zeros(previous.a.shape), np.zeros(previous.b.shape)
    if rule == "anchored":
        total += dense(previous, view.previous.scale)
    for k, u in enumerate(view.updates):
        f, at, s = u.adapter.layers[module], u.directions[module], u.adapter.scale
        own = dense(f, s)
        if rule == "anchored":
            own = own - dense(previous.take(at), view.previous.scale)
        if rule == "segment":
            for row, h in enumerate(at):
                holders = sum(
                    counts[j] for j, v in enumerate(view.updates) if h in v.directions[module]
                )
                if holders:
                    total += counts[k] / holders * dense(f.take([row]), s)
        else:
            total += p[k] * own
        for row, h in enumerate(at):
            a[h] += p[k] * f.a[row]
            b[:, h] += p[k] * f.b[:, row].astype(float) * s / view.previous.scale
    if rule in ("fedavg", "hetlora"):
        return total, view.previous.scale * b @ a
    return total, None


@pytest.mark.parametrize("rule", RULES)
@given(view=rounds(), split=st.sampled_from(["left", "balanced"]))
@settings(max_examples=100, deadline=None)
def test_rule_equals_the_dense_oracle(rule: str, view: RoundView, split: str) -> None:
    merged = merge(rule, view, settings={"split": split})
    lost, whole, summed = 0.0, 0.0, 0.0
    for module, shape in view.shapes.items():
        total, averaged = oracle_sum(rule, view, module)
        factors, held = merged.adapter.layers[module], module_rank(shape, view.rank)
        assert (factors.a.shape, factors.b.shape) == ((held, shape[1]), (shape[0], held))
        assert factors.a.dtype == factors.b.dtype == np.float32
        assert not (~factors.a.any(axis=1) & ~factors.b.any(axis=0)).any()  # no dead pair
        ours = dense(factors, merged.adapter.scale)
        adapters = [view.previous, *(u.adapter for u in view.updates)]
        parts = [float(np.linalg.norm(dense(x.layers[module], x.scale))) for x in adapters]
        size = max(float(np.linalg.norm(total)), 1e-6 * max(parts))
        if averaged is None:
            wanted = best(total, held)
            values = np.linalg.svd(total, compute_uv=False)
            if held < len(values) and values[held - 1] - values[held] > 1e-3 * values[0]:
                assert np.linalg.norm(ours - wanted) <= 1e-5 * size  # the best is unique
            error = float(np.linalg.norm(total - wanted))
            assert np.linalg.norm(total - ours) == pytest.approx(error, abs=5e-6 * size)
        else:
            error = float(np.linalg.norm(total - averaged))
            assert np.linalg.norm(ours - averaged) <= 1e-5 * (size + np.linalg.norm(averaged))
        lost, whole = float(np.hypot(lost, error)), float(np.hypot(whole, np.linalg.norm(total)))
        summed += sum(parts)
    if whole > 1e-9 * summed:  # else the oracle's own sum is nothing but rounding
        assert merged.residual == pytest.approx(lost / whole, abs=1e-5, rel=1e-5)
    assert sum(merged.weights.values()) == pytest.approx(1.0)
    assert list(merged.weights) == [u.device for u in view.updates]


@given(view=rounds(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_personal_equals_the_dense_oracle(view: RoundView, data: st.DataObject) -> None:
    count = len(view.updates)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = rng.dirichlet(np.ones(count), count)
    if data.draw(st.booleans()):
        view = replace(view, updates=[completed(u, view.previous) for u in view.updates])
    for row, result in zip(rows, personal(view, rows), strict=True):
        assert result.scale == view.previous.scale
        for module, shape in view.shapes.items():
            total = np.zeros(shape)
            for w, u in zip(row, view.updates, strict=True):
                total += w * dense(u.adapter.layers[module], u.adapter.scale)
            held = module_rank(shape, view.rank)
            error = np.linalg.norm(total - best(total, held))
            ours = dense(result.layers[module], result.scale)
            size = float(np.linalg.norm(total))
            assert np.linalg.norm(total - ours) == pytest.approx(error, abs=5e-6 * size)


@given(view=rounds())
@settings(max_examples=30, deadline=None)
def test_completed_is_the_trained_directions_over_the_frozen_rest(view: RoundView) -> None:
    for u in view.updates:
        full = completed(u, view.previous)
        for module in view.shapes:
            at, g = u.directions[module], view.previous.layers[module]
            rest = np.setdiff1d(np.arange(g.rank), at)
            wanted = dense(u.adapter.layers[module], u.adapter.scale)
            wanted = wanted + dense(g.take(rest), view.previous.scale)
            np.testing.assert_allclose(
                dense(full.adapter.layers[module], full.adapter.scale), wanted, atol=1e-4
            )
            assert full.directions[module].tolist() == list(range(g.rank))


# ---- directions, re-seeding, determinism -------------------------------------------------------


def one_module(updates: list[Update], rank: int, shape: tuple[int, int] = (9, 8)) -> RoundView:
    rng = np.random.default_rng(5)
    return RoundView(Adapter({"m": draw(rng, shape, rank)}, 1.0), updates, {"m": shape}, rank, 3)


def update(
    device: str, at: list[int], seed: int, examples: int = 1, shape: tuple[int, int] = (9, 8)
) -> Update:
    f = draw(np.random.default_rng(seed), shape, len(at))
    return Update(device, Adapter({"m": f}, 1.0), {"m": np.array(at, np.intp)}, examples, {})


def test_a_gap_in_the_directions_is_scattered_by_index() -> None:
    gapped = update("a", [1, 4], 0)
    merged = merge("fedavg", one_module([gapped], 6)).adapter.layers["m"]
    np.testing.assert_allclose(merged.a[[1, 4]], gapped.adapter.layers["m"].a)
    np.testing.assert_allclose(merged.b[:, [1, 4]], gapped.adapter.layers["m"].b)
    assert not merged.b[:, [0, 2, 3, 5]].any()


@pytest.mark.parametrize("rule", RULES)
def test_null_directions_are_reseeded_with_orthonormal_rows(rule: str) -> None:
    view = one_module([update("a", [0, 1], 0)], 6)
    if rule == "anchored":  # a previous global of rank 2 leaves the rest null
        layer = view.previous.layers["m"]
        b = np.where(np.arange(6) < 2, layer.b, 0)
        view = replace(view, previous=Adapter({"m": Factors(layer.a, b)}, 1.0))
    first, again = (merge(rule, view).adapter.layers["m"] for _ in range(2))
    new = ~first.b.any(axis=0)
    assert new.sum() == 4
    np.testing.assert_allclose(first.a[new] @ first.a[new].T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(first.a[new] @ first.a[~new].T, 0, atol=1e-5)
    np.testing.assert_array_equal(first.a, again.a)
    other = merge(rule, replace(view, seed=4)).adapter.layers["m"]
    assert np.abs(other.a[new] - first.a[new]).max() > 1e-3
    np.testing.assert_allclose(dense(other, 1), dense(first, 1))


@pytest.mark.parametrize("rule", RULES)
def test_a_round_of_zeros_merges_to_zero_and_stays_trainable(rule: str) -> None:
    shapes = {"m": (9, 8)}
    previous = initial_adapter(shapes, 5, 2.0, 0)
    at = {"m": np.arange(3)}
    updates = [Update(f"d{k}", previous.truncated(3), at, 4, {}) for k in range(2)]
    merged = merge(rule, RoundView(previous, updates, shapes, 5, 0))
    layer = merged.adapter.layers["m"]
    assert not layer.b.any()
    assert np.linalg.matrix_rank(layer.a) == 5
    assert merged.residual == 0
    assert merged.weights == {"d0": 0.5, "d1": 0.5}


def test_revived_keeps_what_can_still_be_trained() -> None:
    a, b = np.eye(4, 6), np.zeros((5, 4))
    a[2:], b[0, 2] = 0, 1.0  # rows 0 and 1 have A, row 2 has B, row 3 has neither
    result = revived(Factors(a, b), 0)
    np.testing.assert_array_equal(result.a[:3], a[:3])
    np.testing.assert_array_equal(result.b, b)
    assert np.linalg.norm(result.a[3]) == pytest.approx(1)
    assert np.abs(result.a[:2] @ result.a[3]).max() < 1e-12
    assert module_seed(0, "a") != module_seed(0, "b")


def test_a_stack_wider_than_the_module_takes_the_dense_path_to_the_same_result() -> None:
    rng = np.random.default_rng(1)
    for shape in ((24, 16), (16, 24)):
        terms = [Term(draw(rng, shape, 5), np.full(5, 0.1)) for _ in range(10)]
        whole = np.sum([0.1 * dense(t.factors, 1) for t in terms], axis=0)
        np.testing.assert_allclose(dense_sum(terms, shape), whole, atol=1e-12)
        result = truncate(terms, shape, 4, scale=2.0)
        np.testing.assert_allclose(dense(result.factors, 2.0), best(whole, 4), atol=1e-10)


def test_the_scale_of_the_halves_of_a_product_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    plain = [draw(rng, (30, 28), 3) for _ in range(4)]
    skewed = [
        Factors(f.a * 10.0 ** (6 * k - 9), f.b / 10.0 ** (6 * k - 9)) for k, f in enumerate(plain)
    ]
    one, other = (
        truncate([Term(f, np.ones(3)) for f in fs], (30, 28), 5, scale=1.0)
        for fs in (plain, skewed)
    )
    np.testing.assert_allclose(dense(one.factors, 1), dense(other.factors, 1), atol=1e-4)


def test_what_nearly_cancels_is_still_resolved() -> None:
    rng = np.random.default_rng(4)
    one = draw(rng, (30, 28), 3)
    noise = rng.standard_normal(one.a.shape)
    other = Factors(one.a.astype(np.float64) + 1e-5 * noise, -one.b)
    result = truncate([Term(f, np.ones(3)) for f in (one, other)], (30, 28), 3, scale=1.0)
    wanted = -1e-5 * one.b @ noise
    assert np.linalg.norm(dense(result.factors, 1) - wanted) < 1e-3 * np.linalg.norm(wanted)


# ---- guards ----------------------------------------------------------------------------------


def broken(update_: Update, **layer: npt.NDArray[np.float32]) -> Update:
    f = update_.adapter.layers["m"]
    return replace(
        update_, adapter=Adapter({"m": Factors(layer.get("a", f.a), layer.get("b", f.b))}, 1.0)
    )


def spoiled(array: npt.NDArray[np.floating], value: float) -> npt.NDArray[np.float32]:
    copy = array.astype(np.float32)
    copy[0, 0] = value
    return copy


GOOD = update("good", [0, 1, 2], 0)
LAYER = GOOD.adapter.layers["m"]
BAD = replace(GOOD, device="bad")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "bad",
    [
        broken(BAD, a=spoiled(LAYER.a, np.nan)),
        broken(BAD, b=spoiled(LAYER.b, np.inf)),
        broken(BAD, a=LAYER.a[:1].astype(np.float32)),
        broken(BAD, b=LAYER.b[:5].astype(np.float32)),
        replace(BAD, directions={"m": np.array([0, 2])}),
        replace(BAD, directions={"m": np.array([2, 1, 0])}),
        replace(BAD, directions={"m": np.array([0, 1, 6])}),
        replace(BAD, directions={"m": np.array([-1, 0, 1])}),
        replace(BAD, directions={}),
        replace(BAD, adapter=Adapter({"m": LAYER, "n": LAYER}, 1.0)),
        replace(BAD, adapter=Adapter({}, 1.0)),
    ],
)
def test_a_bad_update_is_refused_by_device_and_module(rule: str, bad: Update) -> None:
    with pytest.raises(MergeError, match="device bad, module") as raised:
        merge(rule, one_module([GOOD, bad], 6))
    assert raised.value.device == "bad"
    assert raised.value.module in ("m", "n")


@pytest.mark.parametrize("rule", RULES)
def test_a_round_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(MergeError, match="no update"):
        merge(rule, one_module([], 6))
    with pytest.raises(MergeError, match="device bad: the scale"):
        merge(rule, one_module([replace(BAD, adapter=Adapter({"m": LAYER}, 0.0))], 6))
    with pytest.raises(MergeError, match="device bad: it counts -1"):
        merge(rule, one_module([replace(BAD, examples=-1)], 6))
    with pytest.raises(MergeError, match="module m: the previous global"):
        merge(rule, replace(one_module([GOOD], 6), rank=5))
    if rule != "hetlora":
        with pytest.raises(MergeError, match="example"):
            merge(rule, one_module([replace(GOOD, examples=0)], 6))
    big = np.float32(3e38)
    huge = broken(GOOD, a=np.full_like(LAYER.a, big), b=np.full_like(LAYER.b, big))
    if RULES[rule].combination.__name__ != "factor_average":
        with pytest.raises(MergeError, match="too large"):
            merge(rule, one_module([huge], 6))


def test_a_device_that_comes_twice_has_the_sum_of_its_shares() -> None:
    view = one_module([update("a", [0], 0, 1), update("b", [0], 1, 2), update("a", [1], 2, 1)], 4)
    assert merge("flexlora", view).weights == {"a": 0.5, "b": 0.5}


def test_settings_are_checked() -> None:
    view = one_module([GOOD], 6)
    with pytest.raises(BadRuleSettings, match="'spilt'"):
        merge("flexlora", view, settings={"spilt": "left"})
    with pytest.raises(BadRuleSettings, match="left, balanced"):
        merge("flexlora", view, settings={"split": "right"})
    assert issubclass(BadRuleSettings, AggregatorError)


# ---- names -----------------------------------------------------------------------------------


class InstalledRule(SimpleNamespace):
    """What importlib.metadata gives for an entry point."""

    def load(self) -> object:
        return self.loaded


def test_a_rule_from_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    view = one_module([GOOD], 6)

    def mine(seen: RoundView, given: object) -> Merged:
        assert given == {"anything": 1}
        return Merged(seen.previous, {}, 0.0)

    def installed(*, group: str) -> list[InstalledRule]:
        assert group == "tunefleet.rules"
        return [
            InstalledRule(name="mine", value="x:mine", loaded=mine),
            InstalledRule(name="text", value="x:text", loaded="no function"),
        ]

    monkeypatch.setattr(rules_module, "entry_points", installed)
    assert merge("mine", view, settings={"anything": 1}).adapter is view.previous
    with pytest.raises(MergeError, match="x:text"):
        merge("text", view, settings={})
    with pytest.raises(UnknownRule, match=r"'other'.*fedavg.*flora, mine, text"):
        merge("other", view)


# ---- trust scores ----------------------------------------------------------------------------


def test_trust_scores_by_hand() -> None:
    cosine = cosine_scores(np.array([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(cosine, [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(validation_scores(np.array([[1.5]])), [[-1.5]])
    scores = prediction_scores(np.array([[0.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(scores, [[0, -10], [0, 0]])  # τ = 10/2, mean of (0, 2) = 1
    np.testing.assert_allclose(prediction_scores(np.array([[0.0, 2.0]] * 2), 3)[0], [0, -6])
    rows = softmax_rows(np.array([[0.0, np.log(3)], [-np.inf, 2.0]]))
    np.testing.assert_allclose(rows, [[0.25, 0.75], [0.0, 1.0]])
    np.testing.assert_allclose(softmax_rows(np.array([[0.0, np.log(9)]]), 2.0), [[0.25, 0.75]])


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), positions=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_prediction_distance_equals_dense_logits(seed: int, count: int, positions: int) -> None:
    rng = np.random.default_rng(seed)
    probes, laid_out = [], []
    for k in range(count):
        tops = 2 + k % 2  # k may differ
        indices = np.stack([rng.choice(12, tops, replace=False) for _ in range(positions)])
        values = rng.standard_normal((positions, tops)).astype(np.float16)
        logits = np.zeros((positions, 12))
        np.put_along_axis(logits, indices, values, axis=1)
        probes.append(TopLogits(indices.astype(np.uint16), values))
        laid_out.append(logits)
    wanted = [[np.abs(x - y).sum(axis=1).mean() for y in laid_out] for x in laid_out]
    np.testing.assert_allclose(prediction_distance(probes), wanted, atol=1e-12)


def test_trust_refuses_what_it_cannot_use() -> None:
    with pytest.raises(BadRuleSettings, match="temperature"):
        softmax_rows(np.zeros((2, 2)), 0.0)
    for worst in (np.nan, np.inf, -np.inf):
        with pytest.raises(MergeError, match="row 1"):
            softmax_rows(np.array([[0.0, 1.0], [worst, worst]]))
    view = one_module([GOOD, BAD], 6)
    with pytest.raises(MergeError, match=r"\(2, 2\)"):
        personal(view, np.ones((1, 2)))
    with pytest.raises(MergeError, match="not negative"):
        personal(view, np.array([[1.5, -0.5], [0.5, 0.5]]))
    one, two = (TopLogits(np.zeros((n, 1), int), np.zeros((n, 1))) for n in (1, 2))
    with pytest.raises(MergeError, match="positions"):
        prediction_distance([one, two])
