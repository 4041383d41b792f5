"""What an update may move, and how large its factors may be, which the product may hide."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from aggregator.merge import Update
from aggregator.updates import factor_norm
from protocol.adapter import Adapter, Factors
from protocol.tensors import encode
from tests.aggregator.uploading import Aggregator, make_job, update


@pytest.mark.parametrize(("a", "b", "norm"), [(0.0, 1e30, 4e30), (1e30, 0.0, 2e30)])
def test_a_factor_counts_even_where_the_other_is_zero(a: float, b: float, norm: float) -> None:
    factors = Factors(np.full((1, 4), a, np.float32), np.full((4, 1), b, np.float32))
    update = Update("pi", Adapter({"q": factors}, 2.0), {"q": np.arange(1)}, 1, {})
    assert factor_norm(update) == pytest.approx(norm)


@pytest.mark.parametrize(
    ("size", "limits", "said"),
    [
        (0.01, {"update_norm": 50, "factor_norm": 50}, ""),
        (0.0, {"update_norm": 1e-9, "factor_norm": 20}, ""),
        (
            0.01,
            {"update_norm": 0.5},
            r"it moves the scaled product by .*, over limits.update_norm = 0.5",
        ),
        (0.01, {"factor_norm": 5}, r"its factors are as large as .*, over limits.factor_norm = 5"),
        (1e30, {}, r"it moves the scaled product by .*, over limits.update_norm = 10000"),
    ],
)
def test_an_update_is_refused_by_the_limit_that_it_exceeds(
    tmp_path: Path, size: float, limits: dict[str, float], said: str
) -> None:
    job = make_job(limits=limits)
    aggregator = Aggregator(tmp_path, job)
    aggregator.greet()
    data = encode(update(job, size), job.encoding_up)
    (answer,) = aggregator.deliver(aggregator.manifest(data), data)
    assert answer.kind == ("reject" if said else "done")
    assert re.fullmatch(said, answer.reason)
    aggregator.store.close()
