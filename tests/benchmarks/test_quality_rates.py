"""The search over learning rates finds the least loss without trying all."""

import pytest

from benchmarks.quality.arms import GRID
from benchmarks.quality.store import best_rate


@pytest.mark.parametrize("start", range(len(GRID)))
@pytest.mark.parametrize("least", range(len(GRID)))
def test_it_climbs_to_the_one_minimum(start, least):
    tried = set()

    def loss(rate: float) -> float:
        tried.add(rate)
        return abs(GRID.index(rate) - least)

    assert best_rate(loss, GRID[start]) == GRID[least]
    assert len(tried) <= abs(start - least) + 3
