"""No more than a window of an upload is asked for at once, and all of it in the end."""

from __future__ import annotations

import random

from aggregator.window import ChunkWindow


def test_every_chunk_is_asked_for_once_and_never_more_than_a_window_is_on_its_way() -> None:
    window = ChunkWindow(size=8)
    missing = [n for n in range(101) if n % 7]
    on_its_way = window.ask("kitchen", "u", missing)
    asked = list(on_its_way)
    while on_its_way:
        assert len(on_its_way) <= 8
        number = on_its_way.pop(random.randrange(len(on_its_way)))
        more = window.arrived("kitchen", "u", number)
        on_its_way += more
        asked += more
    assert asked == missing


def test_an_upload_that_is_offered_again_begins_with_what_is_missing_then() -> None:
    window = ChunkWindow(size=4)
    assert window.ask("kitchen", "u", range(10)) == [0, 1, 2, 3]
    assert window.ask("kitchen", "u", [3, 7, 8, 9]) == [3, 7, 8, 9]
    assert window.arrived("kitchen", "u", 3) == []
    assert window.ask("desk", "v", [1]) == [1]
    assert window.arrived("kitchen", "v", 1) == [], "another device's"
    assert window.arrived("desk", "u", 1) == [], "another upload"
    assert window.arrived("desk", "v", 1) == []
