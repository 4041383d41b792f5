"""The real aggregator of a replay, a process of its own that is told time and when to decide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aggregator.cli import BLAS_THREADS
from aggregator.engine import IN_PROCESS, Engine
from device_profiles.errors import ReplayError
from protocol.link import BrokerAddress
from protocol.loop_link import Loop

ANSWER_S = 600.0
"""A merge of many large updates takes its time."""
Answer = dict[str, Any]


class PacedAggregator:
    """Start `python -m aggregator.paced` for a job; its events go to `on_event`, `engine` merges.

    Raises, as every method does:
        ReplayError: it has ended, or does not answer; what it said last is told.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path,
        job: Path,
        broker: BrokerAddress,
        time_s: float,
        on_event: Callable[[Mapping[str, Any]], None],
        engine: Engine = IN_PROCESS,
    ) -> None:
        self.state, self.key = folder / "aggregator", folder / "aggregator.key"
        self._loop, self._on_event = loop, on_event
        self._log = folder / "aggregator.log"
        self._answers: list[Answer] = []
        self._rest = b""
        self._settled = 0
        """Messages that it has got."""
        command = [sys.executable, "-m", "aggregator.paced", job, "--broker", broker]
        command += ["--state", self.state, "--key", self.key, "--time", time_s]
        command += ["--engine", engine.name]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    **dict.fromkeys((*BLAS_THREADS, "OMP_NUM_THREADS"), "1"),
                    **engine.environment,
                },
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        loop.watch(self._process.stdout, self._read)
        try:
            self.stands = self._answer("stepped")
            """Where the job stands, as it said last."""
        except ReplayError:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def settle(self, taken_in: int) -> dict[str, int]:
        """Wait until it has dealt with so many messages; return how often it told whom something.

        Raises:
            ReplayError: some of them do not come, or others do.
        """
        self._order(do="settle", taken_in=taken_in)
        answer = self._answer("settled")
        if answer["taken_in"] < taken_in:
            raise ReplayError(
                f"the aggregator got {answer['taken_in']} of {taken_in} messages: the broker has "
                "lost some; look at its limits"
            )
        self._settled = answer["taken_in"]
        if self._settled > taken_in:
            self._loop.pump()  # the end of a connection, whose will the broker has said
        self._check_count(self._loop.published)
        return dict(answer["told"])

    def step(self, time_s: float) -> Answer:
        """Tell it the time, have it do what is due, and return where the job stands then.

        Raises:
            ReplayError: it has got messages since all had settled.
        """
        self._order(do="step", time=time_s)
        self.stands = self._answer("stepped")
        sent, self._settled = self._settled, self.stands["taken_in"]
        self._check_count(sent)
        return self.stands

    def _check_count(self, sent: int) -> None:
        if self._settled > sent:
            raise ReplayError(
                f"the aggregator got {self._settled} messages, {sent} were sent: either somebody "
                "else publishes to this job at this broker, or a connection to it broke and "
                f"messages came again; the aggregator's log is {self._log}"
            )

    def stop(self) -> None:
        """End it: by a kill where the broker is gone, for it would wait for that."""
        if self._loop.broken:
            self._process.kill()
        elif self._process.poll() is None:
            try:
                self._order(do="stop")
                self._process.wait(30)
            except (ReplayError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        if self._process.stdout is not None and not self._process.stdout.closed:
            self._loop.forget(self._process.stdout)
            self._process.stdout.close()
        if self._process.stdin is not None:
            with suppress(OSError):  # an order that nobody read is still in its buffer
                self._process.stdin.close()

    def _order(self, **order: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _answer(self, event: str) -> Answer:
        if not self._loop.pump_until(lambda: bool(self._answers) or self._has_ended, ANSWER_S):
            raise ReplayError(f"the aggregator does not answer; its log is {self._log}")
        if not self._answers:
            raise self._ended()
        answer = self._answers.pop(0)
        assert answer["event"] == event, "orders are answered in turn"
        return answer

    @property
    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    def _read(self) -> None:
        assert self._process.stdout is not None
        data = self._process.stdout.read()
        if data is None:
            return
        if not data:  # there is always something to read now: who waits for else would wait on
            raise self._ended()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] in ("settled", "stepped"):
                self._answers.append(event)
            else:
                self._on_event(event)

    def _ended(self) -> ReplayError:
        """Return what to raise where it is gone, or on its way."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        said = self._log.read_text(errors="replace").strip().splitlines()
        return ReplayError(f"the aggregator has ended: {said[-1] if said else 'without a word'}")
