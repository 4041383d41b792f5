"""A small fleet of real processes that a test may kill, and what each of them said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from protocol import topics
from protocol.faults import VARIABLE
from protocol.messages import Status
from protocol.signing import open_message
from protocol.transport import BrokerAddress, Incoming, MqttTransport

Event = dict[str, Any]
PATIENCE_S = 90.0
"""A process that says nothing new for this long fails the test."""


class Program:
    """Run `python -m module …` in a session of its own and keep the events that it prints.

    Another `runner` runs something else: `["node"]` a program of Node. `environment` is added to
    this process's own; `on_event` is called, on another thread, with each event.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[object],
        folder: Path,
        name: str,
        *,
        runner: Sequence[str] = (sys.executable, "-m"),
        environment: Mapping[str, str] | None = None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._on_event = on_event
        self.events: list[Event] = []
        self._news = threading.Condition()
        self._ended = False
        self._stderr = folder / f"{name}-{time.monotonic_ns()}.stderr"
        with self._stderr.open("w") as errors:
            self.process = subprocess.Popen(
                [*runner, module, *(str(a) for a in arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def of(self, kind: str) -> list[Event]:
        """Return the events of a kind so far."""
        with self._news:
            return [event for event in self.events if event["event"] == kind]

    def wait_for(self, kind: str, **fields: object) -> Event:
        """Wait for an event with these fields; fail when the process ends without it."""

        def found() -> Event | None:
            for event in self.events:
                if event["event"] == kind and fields.items() <= event.items():
                    return event
            return None

        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while (event := found()) is None:
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "ended" if self._ended else "was silent"
                    pytest.fail(
                        f"{self.name} {why} before {kind} {fields}; last: {self.events[-3:]}; "
                        f"stderr: {self.stderr}"
                    )
                self._news.wait(left)
        return event

    def end(self, number: int, *, group: bool = False, timeout_s: float = 20.0) -> int:
        """Send a signal to the process, or to all of its group, and return its exit status."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end and return the exit status."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} did not end; last: {self.events[-3:]}; {self.stderr}")
        self._thread.join(5)
        return status

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind: the group holds the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._thread.join(5)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                event = (
                    json.loads(line) if line.startswith("{") else {"event": "said", "text": line}
                )
                self._on_event(event)
                with self._news:
                    self.events.append(event)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Listener:
    """Overhear a broker: what was published on the topics that a filter names, in order."""

    def __init__(self, broker: BrokerAddress, pattern: str, name: str = "listener") -> None:
        self._link = MqttTransport(broker, f"test-{name}")
        self._link.connect()
        self._link.subscribe([pattern])

    def wait_for(self, wanted: Callable[[Incoming], bool]) -> Incoming:
        """Return the next message that is wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            incoming = self._link.receive(1.0)
            if incoming is not None:
                self._link.ack(incoming)
                if wanted(incoming):
                    return incoming
        pytest.fail("what was waited for was not published")

    def close(self) -> None:
        self._link.close()


def last_status(broker: BrokerAddress, device: str) -> Status:
    """Return the status of a device that the broker keeps."""
    topic = topics.topic("status", job="small", device=device)
    listener = Listener(broker, topic, f"status-{time.monotonic_ns()}")
    try:
        found = listener.wait_for(lambda incoming: bool(incoming.payload))
    finally:
        listener.close()
    return open_message(found.payload, topic, Status)[0]


class SmallFleet:
    """Start the aggregator and the devices of one small job, again if a test killed them."""

    def __init__(
        self,
        folder: Path,
        broker: BrokerAddress,
        model: Path,
        calibrations: Path,
        start: Callable[[Program], Program],
        *,
        steps: int = 2,
    ) -> None:
        self._folder = folder
        self.broker = broker
        self._calibrations = calibrations
        self._start = start
        self.job_file = folder / "job.json"
        job = {
            "job": "small",
            "model": str(model),
            "rounds": 2,
            "ladder": [2, 4],
            "training": {"steps": steps, "tokens_per_step": 64, "max_tokens": 64},
            "pruning": {"enabled": False},
            "policy": {"min_devices": 2, "quorum": 2},
        }
        self.job_file.write_text(json.dumps(job))
        for name in ("kitchen", "desk"):
            text = [f"{name} page {n}: " + f"what {name} says {n} times. " * 20 for n in range(8)]
            (folder / f"{name}.txt").write_text("\n\n".join(text))

    def aggregator(self, *more: object) -> Program:
        """Start the aggregator on the state it always has."""
        arguments = ["serve", self.job_file, "--state", self._folder / "aggregator", "--json"]
        arguments += ["--broker", self.broker, "--exit-when-done", *more]
        return self._start(Program("aggregator", arguments, self._folder, "aggregator"))

    def counted_once(self, *aggregators: Program) -> None:
        """Check that the job is done: each round merged, each update counted exactly once."""
        merged = [event["round"] for one in aggregators for event in one.of("merged")]
        assert merged == [1, 2]
        updates = [(e["round"], e["device"]) for one in aggregators for e in one.of("counted")]
        assert sorted(updates) == [(1, "desk"), (1, "kitchen"), (2, "desk"), (2, "kitchen")]

    def device(
        self,
        name: str,
        *more: object,
        fault: str = "",
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> Program:
        """Start a device on the state it always has; a fault point ends it."""
        arguments = ["run", "--json", "--exit-when-done", "--name", name, "--threads", "1"]
        arguments += ["--job", "small", "--broker", self.broker]
        arguments += ["--data", self._folder / f"{name}.txt", "--state", self._folder / name]
        arguments += ["--cache", self._calibrations, "--profile", "laptop-16gb", *more]
        environment = {VARIABLE: fault} if fault else {}
        device = Program(
            "edge_client",
            arguments,
            self._folder,
            name,
            environment=environment,
            on_event=on_event,
        )
        return self._start(device)
