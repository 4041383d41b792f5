"""The norm bound sees a factor that the product hides."""

from __future__ import annotations

import numpy as np
import pytest

from aggregator.merge import Update
from aggregator.updates import factor_norm
from protocol.adapter import Adapter, Factors


@pytest.mark.parametrize(("a", "b", "norm"), [(0.0, 1e30, 4e30), (1e30, 0.0, 2e30)])
def test_a_factor_counts_even_where_the_other_is_zero(a: float, b: float, norm: float) -> None:
    factors = Factors(np.full((1, 4), a, np.float32), np.full((4, 1), b, np.float32))
    update = Update("pi", Adapter({"q": factors}, 2.0), {"q": np.arange(1)}, 1, {})
    assert factor_norm(update) == pytest.approx(norm)
