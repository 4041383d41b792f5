"""Sums too wide for all eigenvectors of a Gram: passes find the best, or say that they did not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aggregator.merge import lowrank
from aggregator.merge.lowrank import truncate
from aggregator.merge.subspace import leading
from aggregator.merge.sums import Dense as DenseSum
from aggregator.merge.sums import Held, Stack, Term, hold, norm_of
from protocol.adapter import Factors
from tests.aggregator.merge.made_rounds import Dense, best, dense

RANK, WIDTH = 24, 400
SHAPES = [(640, 600), (560, 900)]

SPECTRA = {
    "apart": np.r_[np.geomspace(1, 0.3, RANK), np.full(WIDTH - RANK, 1e-3)],
    "flat": np.linspace(1, 0.2, WIDTH),
    "all equal": np.ones(WIDTH),
    "one cluster over the cut": np.r_[np.geomspace(3, 1.5, 10), np.ones(60), np.full(330, 0.3)],
    "slowly falling": 1 / np.sqrt(np.arange(1, WIDTH + 1)),
    "steep": np.geomspace(1, 1e-12, WIDTH),
    "of lower rank": np.r_[np.geomspace(1, 0.1, RANK // 2), np.zeros(WIDTH - RANK // 2)],
    "one": np.r_[1.0, np.full(WIDTH - 1, 1e-6)],
}


def terms_of(spectrum: np.ndarray, shape: tuple[int, int], seed: int = 0) -> list[Term]:
    """Return terms whose sum has these singular values, in float32 factors of rank 20."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((d, len(spectrum))))[0] for d in shape)
    mix = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    b, a = (u * spectrum @ mix).astype(np.float32), (mix.T @ v.T).astype(np.float32)
    parts = (slice(at, at + 20) for at in range(0, len(spectrum), 20))
    return [Term(Factors(a[p], 4 * b[:, p]), np.full(20, 0.25)) for p in parts]


def whole(terms: list[Term]) -> Dense:
    return sum(dense(Factors(f.a, f.b * t.weights), 1) for t in terms if (f := t.read()))  # type: ignore[return-value]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sums of these sizes go to the passes."""
    monkeypatch.setattr(lowrank, "SMALL", 0)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_truncation_loses_no_more_than_the_best(name: str, shape: tuple[int, int]) -> None:
    terms = terms_of(SPECTRA[name], shape)
    total = whole(terms)
    wanted, norm = best(total, RANK), np.linalg.norm(total)
    result = truncate(terms, shape, RANK, scale=2.0)
    ours, least = dense(result.factors, 2.0), np.linalg.norm(total - wanted)
    error = np.linalg.norm(total - ours)
    assert error <= (1 + 1e-5) * least + 5e-7 * norm
    assert result.norm == pytest.approx(norm, rel=1e-6)
    assert result.residual == pytest.approx(error, rel=1e-4, abs=5e-7 * norm)
    if name in ("apart", "steep"):
        assert np.linalg.norm(ours - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", [Stack, DenseSum])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_held_sum_is_the_sum(
    kind: Callable[..., Held], shape: tuple[int, int], dtype: type[np.floating]
) -> None:
    terms = terms_of(SPECTRA["flat"], shape)
    held, total = kind(terms, shape, dtype), whole(terms)
    g = total.T if held.wide else total
    v = np.linalg.qr(np.random.default_rng(1).standard_normal((held.n, 7)))[0]
    for wanted in (np.float32, np.float64):
        forth, back = held.passed(v.astype(wanted))
        assert forth.dtype == back.dtype == wanted
        close = 1e-12 if dtype == wanted == np.float64 else 1e-5
        np.testing.assert_allclose(forth, g @ v, atol=close)
        np.testing.assert_allclose(back, g.T @ g @ v, atol=close)
    lost = np.linalg.norm(g - g @ v @ v.T) ** 2
    assert held.lost(v) == pytest.approx(lost, rel=1e-12 if dtype == np.float64 else 1e-5)
    assert norm_of(terms, shape) == pytest.approx(np.linalg.norm(total), rel=1e-12)
    assert held.size >= np.linalg.norm(total)


def test_the_smaller_form_is_held() -> None:
    assert isinstance(hold(terms_of(np.ones(200), SHAPES[0]), SHAPES[0], np.float32), Stack)
    assert isinstance(hold(terms_of(np.ones(400), SHAPES[0]), SHAPES[0], np.float32), DenseSum)


@pytest.mark.usefixtures("passes")
def test_what_nearly_cancels_is_summed_in_float64() -> None:
    shape = SHAPES[0]
    big, small = terms_of(SPECTRA["apart"], shape), terms_of(SPECTRA["apart"], shape, 1)
    terms = [*big, *(Term(t.source, -t.weights) for t in big)]
    terms += [Term(t.source, 1e-6 * t.weights) for t in small]
    wanted = best(whole(small), RANK) * 1e-6
    ours = dense(truncate(terms, shape, RANK, scale=1.0).factors, 1.0)
    assert np.linalg.norm(ours - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("strange", ["huge A beside a B of zero", "tiny A and huge B"])
def test_what_nearly_cancels_is_seen_beside_factors_at_the_edge_of_float32(strange: str) -> None:
    shape = SHAPES[0]
    factor = 1e-24 if strange == "tiny A and huge B" else 1.0

    def unlike(term: Term, sign: float) -> Term:
        f = term.read()
        a, b = (f.a * factor).astype(np.float32), (f.b / factor).astype(np.float32)
        return Term(Factors(a, b), sign * term.weights)

    big, small = terms_of(SPECTRA["apart"], shape), terms_of(SPECTRA["apart"], shape, 1)
    terms = [unlike(t, sign) for t in big for sign in (1.0, -1.0)]
    terms += [Term(t.source, 1e-6 * t.weights) for t in small]
    if factor == 1.0:
        a, b = np.full((2, shape[1]), 1e20, np.float32), np.zeros((shape[0], 2), np.float32)
        terms.append(Term(Factors(a, b), np.ones(2)))
    wanted = best(whole(small), RANK) * 1e-6
    ours = dense(truncate(terms, shape, RANK, scale=1.0).factors, 1.0)
    assert np.linalg.norm(ours - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("passes")
def test_order_does_not_matter_and_results_repeat() -> None:
    shape = SHAPES[0]
    terms = terms_of(SPECTRA["apart"], shape)
    one, again, other = (
        dense(truncate(ts, shape, RANK, scale=1.0).factors, 1.0)
        for ts in (terms, terms, terms[::-1])
    )
    np.testing.assert_array_equal(one, again)
    assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)


@pytest.mark.usefixtures("passes")
def test_where_passes_find_nothing_all_eigenvectors_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank, "leading", lambda *_: None)
    for shape in SHAPES:
        terms = terms_of(SPECTRA["flat"], shape)
        ours = dense(truncate(terms, shape, RANK, scale=1.0).factors, 1.0)
        np.testing.assert_allclose(ours, best(whole(terms), RANK), atol=1e-6)


def test_a_sum_of_nothing_or_out_of_range_is_not_found() -> None:
    for factor in (0.0, 1e30):
        terms = [Term(t.source, factor * t.weights) for t in terms_of(np.ones(200), SHAPES[0])]
        assert leading(hold(terms, SHAPES[0], np.float32), RANK, 0) is None


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("factor", [1e-30, 1e30, 1e60])
def test_what_float32_can_not_hold_is_merged_in_float64(factor: float) -> None:
    plain = terms_of(SPECTRA["apart"], SHAPES[0])
    terms = [Term(t.source, factor * t.weights) for t in plain]
    wanted = best(whole(plain), RANK)
    ours = dense(truncate(terms, SHAPES[0], RANK, scale=1.0).factors, 1.0) / factor
    assert np.linalg.norm(ours - wanted) <= 1e-5 * np.linalg.norm(wanted)
