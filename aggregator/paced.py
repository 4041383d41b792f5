"""Serve a job at a pace that a replay sets: its clock is told, and it decides only when asked to.

    python -m aggregator.paced job.json --broker URL --state FOLDER --key FILE --time T --engine E

Everything else is the daemon's own. Orders come on its input, a JSON object a line, and are
answered on its output among the events:

    {"do": "settle", "taken_in": N}    answered `settled` once N messages of devices are dealt with
                                       and the broker has every answer to them
    {"do": "step", "time": T}          the time is T now: do what is due; answered `stepped`
    {"do": "stop"}                     so does the end of its input
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from aggregator.config import read_job
from aggregator.daemon import Daemon
from aggregator.engine import Name, open_engine
from aggregator.store import Store
from protocol import topics
from protocol.cli import run_command
from protocol.events import EventLog
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress

WAIT_S = 0.002
"""For a message, while an order is being dealt with."""
IDLE_S = 0.002
"""The same, while there is none."""
SETTLE_S = 20.0
"""How long messages that were announced are waited for while none comes."""
Order = dict[str, Any]


@dataclass(slots=True)
class ToldClock:
    """The time, as an order said last, in seconds since 1970."""

    time_s: float = 0.0

    def __call__(self) -> float:
        return self.time_s


class PacedDaemon(Daemon):
    """A daemon that obeys orders; `told` counts the answers to each device since last settled."""

    told: Counter[str]

    def obey(self, orders: queue.Queue[Order], clock: ToldClock, events: EventLog) -> None:
        """Serve until told to stop."""
        self.told = Counter()
        self.start()
        events.emit("stepped", **self._stands(None))
        while True:
            try:
                order = orders.get_nowait()
            except queue.Empty:
                self.serve(IDLE_S)
                continue
            if order["do"] == "stop":
                return
            if order["do"] == "settle":
                events.emit("settled", **self._settle(order["taken_in"]))
            else:
                clock.time_s = order["time"]
                events.emit("stepped", **self._stands(self.step()))

    def _answer(self, topic: str, payload: bytes) -> None:
        self.told[topics.match(topic).fields["device"]] += 1
        super()._answer(topic, payload)

    def _settle(self, taken_in: int) -> dict[str, object]:
        """Take in so many messages in all; say whom that has told something, and how often."""
        last, seen = time.monotonic(), -1
        while self.taken_in < taken_in or self._link.awaited:
            self.serve(WAIT_S)
            if self.taken_in != seen:
                last, seen = time.monotonic(), self.taken_in
            elif time.monotonic() - last > SETTLE_S:
                break
        told, self.told = dict(self.told), Counter()
        return {"told": told, "taken_in": self.taken_in}

    def _stands(self, action: str | None) -> dict[str, object]:
        """Say where the job stands."""
        now = self._store.round()
        return {
            "action": action,
            "said": hashlib.sha256(self._publisher.last_round).hexdigest()[:16],
            "round": now.number,
            "attempt": now.attempt,
            "state": now.state,
            "version": now.version,
            "deadline": now.deadline,
            "taken_in": self.taken_in,
        }


def main() -> None:
    """Serve until told to stop, or until nobody tells any more."""
    parser = argparse.ArgumentParser(prog="python -m aggregator.paced", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--time", type=float, required=True)
    parser.add_argument("--engine", choices=get_args(Name), default="plain")
    given = parser.parse_args()
    orders: queue.Queue[Order] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put({"do": "stop"})

    threading.Thread(target=listen, name="orders", daemon=True).start()
    clock = ToldClock(given.time)
    events = EventLog(as_json=True)
    events.now = clock
    job, policy = read_job(given.job)
    with open_engine(given.engine) as engine:
        daemon = PacedDaemon(
            job,
            policy,
            Store(given.state),
            BrokerAddress.parse(given.broker),
            events,
            key=SigningKey.load_or_create(given.key),
            clock=clock,
            engine=engine,
        )
        try:
            daemon.obey(orders, clock, events)
        finally:
            daemon.close()


if __name__ == "__main__":
    run_command(main)
