"""A job's rounds go through the whole of a text, whichever processes they are trained in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.data.pack import PackedRow
from edge_client.plan import Plan
from edge_client.trainer.base import TrainReport
from edge_client.trainer.worker import Worker
from protocol.adapter import Adapter
from protocol.messages import Training

PLAN = Plan(4, 8, 1, 4, False, "f32", 1, 10.0, 100.0)
SETTINGS = Training(steps=5, tokens_per_step=16, max_tokens=16)


class Reading:
    """A trainer that only looks at what it is given, a row a step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def train(self, batches: Any, *, settings: Training, **_: object) -> TrainReport:
        self.seen = [int(next(batches).ids[0, 0]) for _ in range(settings.steps)]
        return TrainReport(settings.steps, 0, 1.0, 0.0)

    def adapter(self) -> Adapter:
        return Adapter({}, 1.0)

    def load(self, *_: object) -> None:
        pass


def worker(count: int) -> tuple[Worker, Reading]:
    """Return a fresh training process's worker with so many rows, and what it trains with."""
    made, reading = Worker(lambda value: False), Reading()
    ones = np.ones(4, np.int32)
    rows = [PackedRow(np.full(4, n, np.int32), ones, ones, ones) for n in range(count)]
    vars(made).update(_trainer=reading, _plan=PLAN, _rows={"train": rows})
    return made, reading


def train(made: Worker, reading: Reading, drawn_rows: int | None) -> tuple[list[int], int]:
    """Train for a round; return the rows it saw, and how many are drawn after it."""
    _, report = made.train("fleet", SETTINGS, 1e-3, None, drawn_rows=drawn_rows)
    return reading.seen, report.drawn_rows


def test_a_round_in_a_new_process_goes_on_where_the_last_one_stopped() -> None:
    one, drawn, seen = worker(20), 0, []
    for number in range(1, 5):
        rows, drawn = train(*one, drawn)
        assert drawn == 5 * number
        seen += rows
    assert sorted(seen) == list(range(20)), "each row once"
    drawn, anew = 0, []
    for _ in range(4):
        rows, drawn = train(*worker(20), drawn)
        anew += rows
    assert anew == seen


def test_a_round_that_is_trained_again_begins_where_it_began() -> None:
    one = worker(20)
    _, drawn = train(*one, 0)
    assert train(*one, drawn) == train(*one, drawn) == train(*worker(20), drawn)


@pytest.mark.parametrize("count", [3, 7, 50])
def test_another_text_or_length_goes_on_from_as_many_rows(count: int) -> None:
    seen, drawn = [], 5
    for _ in range(20):
        rows, drawn = train(*worker(count), drawn)
        seen += rows
    assert set(seen) == set(range(count))


def test_a_stream_of_which_nothing_is_kept_goes_on_in_its_process() -> None:
    one, seen = worker(20), []
    for _ in range(4):
        seen += train(*one, None)[0]
    assert sorted(seen) == list(range(20))
