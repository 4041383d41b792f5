"""While memory is short training waits, until there is room for what it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client.policy.memory import ShortMemory
from edge_client.pressure import CALM_S, Reading

Ask = Callable[[float, float, float], str]


@pytest.fixture
def ask() -> Ask:
    """Ask at a time, with so much available of 4000 MiB, of which training takes so much."""
    at = {"s": 0.0, "available": 0.0, "taken": 0.0}
    short = ShortMemory(
        Path("/"),
        lambda: at["taken"],
        read=lambda _, now: Reading(now, 4000, at["available"], 0, 0),
        clock=lambda: at["s"],
    )

    def answer(seconds: float, available: float, taken: float) -> str:
        at.update(s=seconds, available=available, taken=taken)
        reason = short()
        assert reason is None or (reason.kind == "memory" and reason.wants_memory)
        return reason.detail if reason else ""

    return answer


def test_short_memory_is_a_reason_that_wants_the_training_process_to_end(ask: Ask) -> None:
    assert ask(0, 2000, 600) == ""
    assert "90 MiB available" in ask(2, 90, 700)


def test_it_lasts_until_there_is_room_for_the_most_that_training_took(ask: Ask) -> None:
    ask(0, 2000, 900)
    ask(2, 90, 700)
    assert ask(4, 800, 0)
    assert ask(4 + 2 * CALM_S, 800, 0), "room for 240 + 900 MiB there is not"
    assert ask(100, 1500, 0), "it has to stay so"
    assert ask(101 + CALM_S, 1500, 0) == ""


def test_the_kernel_is_asked_once_a_second(ask: Ask) -> None:
    assert ask(0, 2000, 0) == ""
    assert ask(0.5, 50, 0) == ""
    assert ask(1.5, 50, 0)
