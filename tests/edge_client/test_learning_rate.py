"""A device's learning rate: by its rank, and by the round."""

from __future__ import annotations

import pytest

from edge_client.learning import learning_rate
from protocol.messages import Job
from tests.aggregator.uploading import make_job


def job(rounds: int = 5, **training: object) -> Job:
    return make_job(rounds=rounds, training={"learning_rate": 8e-3, **training})


def test_a_small_rank_learns_faster_unless_the_job_says_otherwise() -> None:
    assert learning_rate(job(), 128) == 8e-3
    assert learning_rate(job(), 2) == pytest.approx(8e-3 * 8)
    assert learning_rate(job(learning_rate_by_rank=False), 2) == 8e-3


def test_the_rate_falls_evenly_to_that_of_the_last_round() -> None:
    falling = job(learning_rate_last=0.2, learning_rate_by_rank=False)
    rates = [learning_rate(falling, 2, number) for number in (1, 2, 3, 4, 5)]
    assert rates == pytest.approx([8e-3 * part for part in (1.0, 0.8, 0.6, 0.4, 0.2)])
    assert learning_rate(falling, 2, 6) == rates[-1], "a job that was cut short goes on at it"


@pytest.mark.parametrize("part", [0.0, 1.5, -0.1, "0.5"])
def test_a_last_round_that_learns_nothing_or_more_than_the_first_is_refused(part: object) -> None:
    with pytest.raises(ValueError, match="learning_rate_last"):
        job(learning_rate_last=part)


def test_the_rate_stays_by_default_and_where_there_is_one_round() -> None:
    assert {learning_rate(job(), 128, number) for number in (1, 3, 5)} == {8e-3}
    assert learning_rate(job(rounds=1, learning_rate_last=0.1), 128) == 8e-3
