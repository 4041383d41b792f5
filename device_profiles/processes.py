"""Child processes that say what they do as JSON Lines: started, listened to, ended."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from device_profiles.errors import ReplayError
from protocol.lifeline import lifeline, tied_environment
from protocol.signals import stop_on_signals

Event = dict[str, Any]
GRACE_S = 10.0


class Processes:
    """Run commands of this project side by side and merge their events into one stream."""

    def __init__(self, log: Path, folder: Path) -> None:
        self._log = log.open("a", encoding="utf-8")
        self._folder = folder
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._threads: list[threading.Thread] = []

    def start(self, name: str, module: str, arguments: Sequence[object]) -> None:
        """Start `python -m module arguments…`; its stderr goes to a file named after it."""
        command = [sys.executable, "-m", module, *(str(a) for a in arguments)]
        with (self._folder / f"{name}.stderr").open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=lifeline(),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=tied_environment(PYTHONUNBUFFERED="1"),
            )
        self._running[name] = process
        thread = threading.Thread(target=self._listen, args=(name, process), daemon=True)
        thread.start()
        self._threads.append(thread)

    def pid(self, name: str) -> int:
        """Return the number of a process that was started by that name."""
        return self._running[name].pid

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Yield events as they come, a good `exit` among them, until `timeout_s` has passed in all.

        Raises:
            ReplayError: the time is up, or a process ended with an error; says what it said.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ReplayError(f"the replay did not end within {timeout_s:.0f} s")
            try:
                event = self._events.get(timeout=min(left, 0.5))
            except queue.Empty:
                continue
            if event["event"] == "exit":
                if event["status"] != 0:
                    raise ReplayError(f"{event['process']} failed: {self._last_words(event)}")
                yield event
                continue
            json.dump(event, self._log)
            self._log.write("\n")
            yield event

    def stop(self) -> None:
        """End what still runs: first kindly, then not; `start`ed processes only.

        A second Ctrl-C, from somebody impatient, does not keep it from ending them all.
        """
        with stop_on_signals(lambda: None):
            self._stop()

    def _stop(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join(1)
        self._log.close()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {"event": "said", "text": line.rstrip()}
                self._events.put({**event, "process": name})
        self._events.put({"event": "exit", "process": name, "status": process.wait()})

    def _last_words(self, event: Event) -> str:
        """Return the line that a failed process ended with."""
        path = self._folder / f"{event['process']}.stderr"
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = (said or lines or [f"status {event['status']}"])[-1]
        return f"{last} (all it said: {path})"
