"""Means, intervals and paired differences, against numbers worked out by hand."""

import math

import pytest

from benchmarks.quality.paired import compare, interval


def test_interval_of_three():
    # mean 2, deviation 1, t(0.975, 2) = 4.3027: 4.3027 / √3
    found = interval({0: 1.0, 1: 2.0, 2: 3.0})
    assert found.mean == 2.0
    assert found.half == pytest.approx(2.4842, abs=1e-3)
    assert str(found) == "2.000 ± 2.484"


def test_one_seed_has_no_interval():
    found = interval({0: 1.5})
    assert math.isnan(found.half)
    assert str(found) == "1.500"


def test_pairs_take_out_what_seeds_share():
    losses = {0: 1.0, 1: 5.0, 2: 9.0, 3: 100.0}
    other = {0: 1.1, 1: 5.1, 2: 9.1, 4: 0.0}
    found = compare(losses, other)
    assert found.difference.mean == pytest.approx(-0.1)
    assert found.difference.half == pytest.approx(0.0, abs=1e-9)
    assert (found.wins, found.difference.count) == (3, 3)
    assert found.percent == pytest.approx(100 * -0.1 / 5.1)
    assert str(found) == "-2.0 ± 0.0 % (3 of 3)"


def test_no_seed_in_common():
    assert compare({0: 1.0}, {1: 1.0}) is None
