"""Events that others can cause at will are told once a minute for each key."""

from __future__ import annotations

import io
import json

from protocol.events import SELDOM_S, EventLog, Seldom


def test_what_is_left_out_is_counted() -> None:
    log, now = io.StringIO(), 0.0
    seldom = Seldom(EventLog(as_json=True, stream=log), lambda: now)
    assert [seldom.emit("a", "bad", n=n) for n in range(3)] == [True, False, False]
    assert seldom.emit("b", "bad", n=9)
    now = SELDOM_S
    assert seldom.emit("a", "bad", n=3)
    now = 2 * SELDOM_S
    assert seldom.emit("a", "bad", n=4)
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(e["n"], e.get("left_out")) for e in told] == [
        (0, None), (9, None), (3, 2), (4, None),
    ]  # fmt: skip
