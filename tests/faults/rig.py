"""A fleet under fire: a broker, an aggregator, devices; each is started again when it ends."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.broker import free_port
from protocol.faults import VARIABLE
from tests.conftest import MOSQUITTO
from tests.faults.audit import Auditor
from tests.faults.audit_personal import PersonalAuditor
from tests.faults.processes import Event, Program

JOB = "faults"
DEVICES = ("attic", "barn", "cellar")
PROGRESS = ("counted", "merged")
PAUSE_S = 0.2
"""Between the end of a process by itself and its next start, as a service manager leaves."""
STOP_S = 30.0
"""Whoever is asked to stop has ended by then."""
STALLED_S = 150.0
"""Nothing makes progress for this long: the fleet has not recovered."""

Start = Callable[[Mapping[str, str]], Program]
AuditorOf = Callable[[Path, dict[str, Path]], Auditor | PersonalAuditor]


class NotRecovered(Exception):
    """The fleet stands still."""


@dataclass(frozen=True)
class Blow:
    """One kill: at a fault point (`name:nth`), or with a signal some seconds after a start."""

    point: str = ""
    after_s: float = 0.0
    number: int = signal.SIGKILL


class Service:
    """One process of the fleet, over all its lives."""

    def __init__(self, name: str, start: Start) -> None:
        self.name = name
        self._start = start
        self._program: Program | None = None
        self._ended_at = 0.0
        self.started_at = 0.0
        self.environment: dict[str, str] = {}
        """For every life to come, say another clock."""
        self.problems: list[str] = []
        self.ends: list[str] = []
        """How lives ended that nobody took."""
        self.lives: list[Program] = []

    @property
    def alive(self) -> bool:
        return self._program is not None and self._program.process.poll() is None

    @property
    def program(self) -> Program:
        assert self._program is not None
        return self._program

    def start(self, point: str = "") -> None:
        armed = {VARIABLE: point} if point else {}
        self.started_at = time.monotonic()
        self._program = self._start({**self.environment, **armed})
        self.lives.append(self._program)

    def end(self, number: int) -> None:
        """End this life with a signal."""
        if self.alive:
            self.program.process.send_signal(number)
        try:
            self.program.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{self.name} did not end in {STOP_S:.0f} s on signal {number}")
            self.program.process.kill()
        self.program.wait()

    def revive(self) -> None:
        """Start again, after a pause, what ended by itself."""
        if self.alive:
            return
        if not self._ended_at:
            self._ended_at = time.monotonic()
            status, said = self.program.wait(), self.program.stderr.strip()
            self.ends.append(f"{self.name} ended with {status}: {said[-2000:]}")
        elif time.monotonic() - self._ended_at > PAUSE_S:
            self._ended_at = 0.0
            self.start()

    def complaints(self) -> list[str]:
        """Return what went wrong in its lives since the last call: no user should ever see it."""
        said = (life.stderr for life in self.lives)
        found = [f"{self.name}: {text[-2000:]}" for text in said if "Traceback" in text]
        found += self.problems
        self.lives, self.problems = self.lives[-1:], []
        return found


class Killer:
    """Deal blows to one service, one after the other, and time how long each recovery takes.

    A service that two blows in a row have kept from any progress is left alone until it makes some.
    """

    def __init__(self, rig: Rig, service: Service, blows: Sequence[Blow]) -> None:
        self._rig, self.service, self._blows = rig, service, list(blows)
        self._blow: Blow | None = None
        self._restarted_at = 0.0
        self._in_a_row = 0
        self.dealt = 0
        self.recoveries: list[float] = []
        self._again(restart=service.alive)

    @property
    def finished(self) -> bool:
        return not self._blows and self._blow is None and not self._restarted_at

    def step(self) -> None:
        progress_at = self._rig.progress_at(self.service.name)
        if self._restarted_at and progress_at > self._restarted_at:
            self.recoveries.append(progress_at - self._restarted_at)
            self._restarted_at, self._in_a_row = 0.0, 0
        if self._blow is None:
            if self._blows and not self._restarted_at:
                self._again(restart=True)
        elif not self.service.alive:
            status = self.service.program.wait()
            if status == -signal.SIGKILL or not self._blow.point:
                self._struck()
            else:
                said = self.service.program.stderr.strip()
                self.service.ends.append(f"{self.service.name} ended with {status}: {said[-500:]}")
                time.sleep(PAUSE_S)
                self.service.start(self._blow.point)
        elif self._blow.point and time.monotonic() - self.service.started_at > STALLED_S:
            raise NotRecovered(f"{self.service.name} never came to {self._blow.point}")
        elif self._blow.after_s and (
            time.monotonic() - self.service.started_at > self._blow.after_s
        ):
            self.service.end(self._blow.number)
            self._struck()

    def _struck(self) -> None:
        self.dealt += 1
        self._in_a_row += 1
        if self._in_a_row < 2:
            self._again(restart=False)
        else:
            self._blow = None
            self.service.start()
        self._restarted_at = time.monotonic()

    def _again(self, *, restart: bool) -> None:
        """Go on with the next blow, or without one when all have been dealt."""
        self._blow = self._blows.pop(0) if self._blows else None
        if restart and self._blow is not None and not self._blow.point:
            self.service.started_at = time.monotonic()  # the blow falls on the life there is
            return
        if restart and self.service.alive:
            self.service.end(signal.SIGTERM)
        self.service.start(self._blow.point if self._blow else "")


class Rig:
    """Run broker, aggregator and devices in a folder, each on state that outlives it."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        devices: Sequence[str] = DEVICES,
        modules: int = 3,
        auditor: AuditorOf = Auditor,
        **settings: object,
    ) -> None:
        """Prepare; an update has 128 KiB of numbers for each module, and a chunk as many.

        The job is merged by `fedavg`, which `Auditor` can follow, unless `settings` say
        otherwise.
        """
        assert MOSQUITTO is not None
        self._auditor = auditor
        self.folder = folder
        self.random = random.Random(seed)
        self.port = free_port()
        self.broker_home = folder
        """Where the broker's settings are, and what it keeps."""
        self.serve: Sequence[object] = ("--broker", f"mqtt://127.0.0.1:{self.port}")
        """How the aggregator is told where its broker is."""
        self.merged = 0
        """Rounds merged since this rig is there."""
        self._progress: dict[str, float] = {}
        self._write_settings(len(devices), modules, settings)
        self.broker = Service("broker", self._start_broker)
        self.aggregator = Service("aggregator", self._start_aggregator)
        self.addresses = dict.fromkeys(devices, f"mqtt://127.0.0.1:{self.port}")
        """Where each device finds the broker: a test may put a bad link in between."""
        self.devices = {
            name: Service(
                name, lambda environment, name=name: self._start_device(name, environment)
            )
            for name in devices
        }

    @property
    def services(self) -> list[Service]:
        return [self.broker, self.aggregator, *self.devices.values()]

    def begin(self, point: str = "") -> float:
        """Begin a new fleet; return the seconds until its first round was merged.

        With a point its aggregator is killed there on its first start, and time counts from the
        second.
        """
        for service in self.services:
            if service.lives:
                service.end(signal.SIGKILL)
        self.clear()
        self.auditor = self._auditor(
            self.folder / "aggregator", {name: self.folder / name for name in self.devices}
        )
        self.broker.start()
        time.sleep(0.3)
        for service in self.services[1:]:
            service.start(point if service is self.aggregator else "")
        if point:
            status = self.aggregator.program.wait()
            assert status == -signal.SIGKILL, f"ended with {status}, not at {point}"
            self.aggregator.start()
        began = time.monotonic()
        self.wait_for_rounds(1)
        return time.monotonic() - began

    def clear(self) -> None:
        """Take away what all of them have on disk."""
        for folder in ("aggregator", *self.devices):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        self.forget_broker()

    def progress_at(self, name: str) -> float:
        """Return when a device's update was last counted, or anything for another service."""
        return self._progress.get(name if name in self.devices else "fleet", 0.0)

    def run(self, killers: Sequence[Killer]) -> None:
        """Let all killers do their work."""
        self.keep_up(lambda: all(killer.finished for killer in killers), killers)

    def wait_for_rounds(self, count: int) -> None:
        """Wait until so many more rounds are merged."""
        wanted = self.merged + count
        self.keep_up(lambda: self.merged >= wanted)

    def restart(self, *services: Service) -> float:
        """Have services ended in good order and started again; return seconds until progress."""
        for service in services:
            service.end(signal.SIGTERM)
        began = time.monotonic()
        for service in services:
            service.start()
        self.wait_for_rounds(1)
        return time.monotonic() - began

    def keep_up(self, done: Callable[[], bool], killers: Sequence[Killer] = ()) -> None:
        """Start again who ends, until something is done.

        Raises:
            NotRecovered: nothing is counted or merged for a long time.
        """
        began = time.monotonic()
        while not done():
            for killer in killers:
                if not killer.finished:
                    killer.step()
            theirs = {k.service.name for k in killers if not k.finished}
            for service in self.services:
                if service.name not in theirs:
                    service.revive()
            time.sleep(0.02)
            if time.monotonic() - max(began, self._progress.get("fleet", 0.0)) > STALLED_S:
                raise NotRecovered(self.last_words())

    def last_words(self) -> str:
        """Return what each process said last, for whoever has to find out why."""
        return "\n".join(
            f"{s.name} ({'alive' if s.alive else 'dead'}): {s.program.events[-4:]} "
            f"{s.program.stderr[-500:]}"
            for s in self.services
        )

    def forget_broker(self) -> None:
        """Take away what the broker has on disk."""
        shutil.rmtree(self.broker_home / "broker", ignore_errors=True)
        (self.broker_home / "broker").mkdir()

    def _note(self, event: Event) -> None:
        """Note progress, with this process's own clock."""
        if event["event"] in PROGRESS:
            now = time.monotonic()
            self._progress["fleet"] = now
            self._progress[event.get("device", "fleet")] = now
            self.merged += event["event"] == "merged"

    def _write_settings(self, devices: int, modules: int, settings: Mapping[str, object]) -> None:
        (self.folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n"
            f"persistence true\npersistence_location {self.folder}/broker/\nautosave_interval 5\n"
            "max_inflight_messages 32\nmax_queued_messages 10000\n"
        )
        shapes = {f"layer.{n:03}": (256, 256) for n in range(modules)}
        job = {
            "job": JOB,
            "base": {"name": "none", "sha256": "0" * 64, "parameters": 0, "modules": shapes},
            "scale": 1.0,
            "rounds": 100_000,
            "rule": "fedavg",
            "ladder": [32, 64],
            "remainder": "dropped",
            "directions": "top",
            "encoding_up": "f32",
            "encoding_down": "f32",
            "pruning": {"enabled": False},
            "policy": {"min_devices": devices, "quorum": devices, "keep_versions": 0},
            **settings,
        }
        (self.folder / "job.json").write_text(json.dumps(job))

    def _start_broker(self, environment: Mapping[str, str]) -> Program:
        return Program(
            "-c",
            [self.broker_home / "mosquitto.conf"],
            self.folder / "logs",
            "broker",
            runner=[str(MOSQUITTO)],
            environment=environment,
        )

    def _start_aggregator(self, environment: Mapping[str, str]) -> Program:
        arguments = ["serve", self.folder / "job.json", "--state", self.folder / "aggregator"]
        arguments += ["--json", *self.serve]
        logs = self.folder / "logs"
        return Program(
            "aggregator",
            arguments,
            logs,
            "aggregator",
            environment=environment,
            on_event=self._note,
        )

    def _start_device(self, name: str, environment: Mapping[str, str]) -> Program:
        arguments = ["--name", name, "--broker", self.addresses[name]]
        arguments += ["--state", self.folder / name, "--job", JOB]
        logs = self.folder / "logs"
        return Program("tests.faults.device", arguments, logs, name, environment=environment)


@contextmanager
def running(
    folder: Path,
    seed: int,
    devices: Sequence[str] = DEVICES,
    modules: int = 3,
    auditor: AuditorOf = Auditor,
    kind: type[Rig] = Rig,
    **settings: object,
) -> Iterator[Rig]:
    """Run a fleet for as long as the block lasts; leave no process behind."""
    (folder / "logs").mkdir(parents=True)
    rig = kind(folder, seed, devices, modules, auditor, **settings)
    try:
        yield rig
    finally:
        for service in rig.services:
            if service.lives:
                service.program.__exit__()
