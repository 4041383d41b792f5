"""A replay whose every update is refused does not wait for a deadline: it says why, and ends."""

from __future__ import annotations

from device_profiles.history import History

BOTH = ["pi", "desk"]


def rejected(device: str, number: int) -> dict[str, object]:
    return {
        "event": "rejected",
        "device": device,
        "round": number,
        "reason": f"{device}: too large",
    }


def counted(device: str, number: int) -> dict[str, object]:
    return {
        "event": "counted", "device": device, "round": number, "rank": 2, "bytes": 1, "metrics": {}
    }  # fmt: skip


def test_only_where_no_device_is_left_can_a_round_not_end() -> None:
    history = History()
    for event, ends in (
        (rejected("pi", 1), False),
        (counted("desk", 1), False),
        (counted("pi", 1), False),  # in its next attempt
        (rejected("pi", 2), False),
        (rejected("desk", 1), False),
        (rejected("desk", 2), True),
    ):
        history.take(event)
        assert bool(history.all_refused(BOTH)) is ends, event
    said = "every device's update of round 2 was refused: pi: too large"
    assert history.all_refused(BOTH) == said
