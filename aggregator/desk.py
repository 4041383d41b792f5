"""What is asked of the whole daemon: devices let in and put out, jobs created.

Asked as commands to one job are (aggregator.control), in `daemon.sqlite` above the state folders.
Whom the fleet knows is in its registry, another database: what is done there can be done twice, so
that a daemon that is killed in between does it again, and answers once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from aggregator.commands import FLEET_FILE, CommandTable, Waiting
from aggregator.commands import SCHEMA as COMMANDS_SCHEMA
from aggregator.config import PolicySettings
from aggregator.control import Command, CreateJob, Enrol, Revoke, read_command
from aggregator.daemon import Daemon
from aggregator.enrol.folder import FleetFolder, check_device
from aggregator.errors import ControlRefused, FolderError, StoreError
from aggregator.rounds import Policy
from aggregator.service import Service
from protocol.database import Database
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.messages import Job
from protocol.mistakes import first_mistake

SCHEMA = """
CREATE TABLE IF NOT EXISTS created (
  job TEXT PRIMARY KEY, settings TEXT NOT NULL, policy TEXT NOT NULL, at REAL NOT NULL) STRICT;
"""


class Opener(Protocol):
    """Opens the states of jobs, and prepares to serve them."""

    def open(self, job: Job, policy: Policy) -> Daemon: ...
    def close(self, job: str) -> None: ...


Outcome = tuple[str, dict[str, Any]]
"""What was done, in words and as fields."""


class FleetDesk:
    """Answer what is asked of the daemon whose state folders are in `root`; one thread."""

    def __init__(
        self,
        root: Path,
        events: EventLog,
        *,
        fleet: FleetFolder | None,
        opener: Opener | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; without an `opener` it serves the one job that it was started with."""
        self._root, self._events, self._fleet = root, events, fleet
        self._opener, self._clock = opener, clock
        with self._in_words():
            path = root / FLEET_FILE
            self._db = Database(path, SCHEMA + COMMANDS_SCHEMA, self._in_words)
        self._commands = CommandTable(self._db)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise StoreError(f"can't use {self._root / FLEET_FILE}: {why}") from None

    def created(self) -> list[tuple[Job, Policy]]:
        """Return the jobs that were created while the daemon ran, which it serves from then on."""
        rows = self._db.rows("SELECT settings, policy FROM created ORDER BY job")
        return [
            (Job.model_validate_json(job), PolicySettings.model_validate_json(policy).policy())
            for job, policy in rows
        ]

    def step(self, service: Service) -> None:
        """Answer what is waiting."""
        for asked in self._commands.waiting():
            self._answer(asked, service)

    def _answer(self, asked: Waiting, service: Service) -> None:
        name, started = "", None
        try:
            command = read_command(asked.command)
            name = command.kind
            if self._clock() > asked.expires:
                raise ControlRefused("late", "nobody waits for it any more: nothing was changed")
            started = self._opened(command, service) if isinstance(command, CreateJob) else None
            with self._db.transaction():
                if not self._commands.is_waiting(asked.key):
                    self._forget(started)
                    return
                said, fields = self._do(command)
                self._commands.settle(
                    asked.key, "done", said=said, fields=json.dumps(fields), at=self._clock()
                )
        except ControlRefused as error:
            self._refuse(asked, name, error.code, str(error))
            return
        except TunefleetError as error:
            self._forget(started)
            self._refuse(asked, name, "failed", str(error))
            return
        self._events.emit("command", command=name, by=asked.by, said=said, **fields)
        if started is not None:
            service.add(started)

    def _forget(self, started: Daemon | None) -> None:
        if started is not None and self._opener is not None:
            self._opener.close(started.job)

    def _refuse(self, asked: Waiting, name: str, code: str, why: str) -> None:
        self._commands.settle(asked.key, "refused", code=code, said=why, at=self._clock())
        self._events.emit("command-refused", command=name, by=asked.by, code=code, reason=why)

    def _do(self, command: Command) -> Outcome:
        if isinstance(command, Revoke):
            return self._revoke(command.device)
        if isinstance(command, Enrol):
            return self._enrol(command)
        if isinstance(command, CreateJob):
            name = command.job["job"]
            self._db.run(
                "INSERT OR REPLACE INTO created VALUES (?, ?, ?, ?)",
                name,
                json.dumps(command.job),
                json.dumps(command.policy),
                self._clock(),
            )
            return f"job {name!r} is served from now on", {"job": name}
        raise ControlRefused("wrong", f"{command.kind!r} is asked of a job, not of the daemon")

    def _members(self) -> FleetFolder:
        if self._fleet is None:
            raise ControlRefused(
                "state",
                "this aggregator has no fleet's folder (--dir): devices come and go as they like",
            )
        return self._fleet

    def _revoke(self, device: str) -> Outcome:
        fleet = self._members()
        try:
            joined = fleet.revoke(device, datetime.fromtimestamp(self._clock(), timezone.utc))
        except FolderError as error:
            code = "unknown" if "there is no device" in str(error) else "failed"
            raise ControlRefused(code, str(error)) from None
        fleet.reload_broker()
        said = f"{device} is revoked" if joined else f"{device} had not joined: its token is void"
        return said, {"device": device, "joined": joined}

    def _enrol(self, command: Enrol) -> Outcome:
        fleet = self._members()
        try:
            check_device(command.device)
        except FolderError as error:
            raise ControlRefused("wrong", str(error)) from None
        registry = fleet.registry()
        try:
            registry.add_token(command.digest, command.device, expires=command.expires)
        finally:
            registry.close()
        said = f"{command.device} may join, once, with its token"
        return said, {"device": command.device, "expires": command.expires}

    def _opened(self, command: CreateJob, service: Service) -> Daemon:
        """Open the state of a job that is to be created, and see whether it can be served."""
        if self._opener is None:
            raise ControlRefused(
                "state", "this aggregator serves the one job it was started with; use serve -c"
            )
        try:
            job = Job.model_validate(command.job)
            policy = PolicySettings.model_validate(command.policy).policy()
        except ValidationError as error:
            raise ControlRefused("wrong", first_mistake(error)) from None
        if job.job in service.jobs:
            raise ControlRefused("state", f"job {job.job!r} is served already")
        if not service.connected:
            raise ControlRefused("state", "there is no connection to the broker now")
        daemon = self._opener.open(job, policy)
        try:
            daemon.check()
        except TunefleetError:
            self._opener.close(job.job)
            raise
        return daemon
