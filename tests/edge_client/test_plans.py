"""A device's plan: smaller after a kill, another where memory is; its rank comes back with it."""

from __future__ import annotations

import io
import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from edge_client.errors import EdgeError, NoPlanFits
from edge_client.outbox import Outbox
from edge_client.plan import Plan
from edge_client.plans import Plans, Reach
from protocol.events import EventLog
from tests.aggregator.uploading import make_job


class Memory:
    """Equipment whose plans have the rank that its memory allows."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def plan(self, *, below_mib: float = inf) -> Plan:
        ranks = [r for r in (2, 4, 8) if r <= self.rank and 10 * r < below_mib]
        if not ranks:
            raise NoPlanFits("too little memory")
        rank = ranks[-1]
        return Plan(rank, rank, 1, 64, False, "f32", 1, 10.0 * rank, 1000.0)

    def learner(self, *_: Any) -> Any:
        raise AssertionError("nobody learns here")


def plans(folder: Path, memory: Memory, held: list[int], stop: bool = False) -> tuple[Plans, Any]:
    said = io.StringIO()
    log = EventLog(as_json=True, stream=said)
    outbox = Outbox(folder, in_memory=True)
    return Plans(make_job(), memory, outbox, log, lambda: stop, held.append), said


def test_a_plan_follows_the_memory_there_is_both_ways(tmp_path: Path) -> None:
    memory, held = Memory(8), []
    found, said = plans(tmp_path, memory, held)
    assert (found.now.rank, found.rank, found.reach()) == (8, 8, Reach(8, 8))
    assert found.anew() is None
    memory.rank = 2
    plan = found.anew()
    assert plan is not None and plan.rank == found.rank == 2
    memory.rank = 1
    with pytest.raises(NoPlanFits):
        found.anew()
    assert found.now.rank == 2, "it stays"
    memory.rank = 8
    assert found.anew() is not None and found.rank == 8 and held == [2, 8]
    ranks = [json.loads(line)["rank"] for line in said.getvalue().splitlines()]
    assert ranks == [2, 8]


def test_a_plan_that_was_too_much_is_not_made_again(tmp_path: Path) -> None:
    memory, held = Memory(8), []
    found, _ = plans(tmp_path, memory, held)
    assert found.step_down(found.now, "killed").rank == 4
    assert found.anew() is None and found.now.rank == 4
    stopping, _ = plans(tmp_path, memory, held, stop=True)
    with pytest.raises(EdgeError, match="killed to stop"):
        stopping.step_down(stopping.now, "killed")


def test_an_outbox_in_memory_touches_no_disk(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "nowhere", in_memory=True)
    assert outbox.next_boot(1000.0) == 1000 and outbox.next_boot(1000.0) == 1001
    outbox.close()
    assert not (tmp_path / "nowhere").exists()
