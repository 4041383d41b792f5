"""Trust scores by hand and against dense logits, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.errors import BadRuleSettings, MergeError
from aggregator.merge.trust import (
    cosine_scores,
    personal,
    prediction_distance,
    prediction_scores,
    softmax_rows,
)
from protocol.probe import TopLogits
from tests.aggregator.merge.made_rounds import (
    BAD,
    GOOD,
    one_module,
)


def test_trust_scores_by_hand() -> None:
    cosine = cosine_scores(np.array([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(cosine, [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
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


def test_one_far_answer_leaves_the_weights_of_the_others() -> None:
    near = np.array([[0.0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]])
    far = np.pad(near, (0, 1), constant_values=1e6)
    far[4, 4] = 0
    before, after = (
        softmax_rows(prediction_scores(near, 2)),
        softmax_rows(prediction_scores(far, 2)),
    )
    assert after[:4, 4].max() < 1e-9
    assert np.abs(after[:4, :4] - before).max() < 0.2, "by the mean all four would be level"
    assert after[0, 0] > 2 * after[0, 3]
    same = np.array([[0.0, 0, 0, 6]] * 4)  # most answered alike: the mean, as published
    np.testing.assert_allclose(prediction_scores(same, 1)[0], [0, 0, 0, -4])


def test_trust_refuses_what_it_cannot_use() -> None:
    with pytest.raises(BadRuleSettings, match="temperature"):
        softmax_rows(np.zeros((2, 2)), 0.0)
    for worst in (np.nan, np.inf, -np.inf):
        with pytest.raises(MergeError, match="row 1"):
            softmax_rows(np.array([[0.0, 1.0], [worst, worst]]))
    view = one_module([GOOD, BAD], 6)
    with pytest.raises(MergeError, match="2 columns"):
        personal(view, np.ones((2, 3)))
    with pytest.raises(MergeError, match="not be negative"):
        personal(view, np.array([[1.5, -0.5], [0.5, 0.5]]))
    one, two = (TopLogits(np.zeros((n, 1), int), np.zeros((n, 1))) for n in (1, 2))
    with pytest.raises(MergeError, match="positions"):
        prediction_distance([one, two])
