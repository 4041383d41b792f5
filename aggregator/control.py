"""What an operator may ask of a daemon while it runs, and how it is asked.

A command is a row in a database that the daemon writes too: a job's own store, or, for what is of
the whole fleet, `daemon.sqlite` beside the state folders. The daemon looks there in its own loop,
does what it says and commits the answer with the effect, in one transaction, and says so in an
event. So a command is done once or not at all, whoever is killed when. Who may write the database
may command: its mode is 0600.

    ask(state_folder, PauseJob(), by="page")
    ask(root_of_states, Revoke("kitchen"), by="cli")

`ask` is for other processes and other threads alike: each call opens a connection of its own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from aggregator.commands import FLEET_FILE, STORE_FILE, CommandTable
from aggregator.errors import ControlRefused, NoDaemon
from protocol.files import folder_holder
from protocol.mistakes import first_mistake

TIMEOUT_S = 30.0
POLL_S = 0.03

Scope = Literal["job", "fleet"]


@dataclass(frozen=True, slots=True)
class PauseJob:
    """Open, extend and merge no round, and ask no device; what comes is still counted."""

    kind: Literal["pause"] = "pause"
    scope: ClassVar[Scope] = "job"


@dataclass(frozen=True, slots=True)
class ResumeJob:
    """Go on; the open round has the time that it had left."""

    kind: Literal["resume"] = "resume"
    scope: ClassVar[Scope] = "job"


@dataclass(frozen=True, slots=True)
class ChangePolicy:
    """Change how rounds are run, from now on and over restarts.

    A setting that is None stays as it is; one that is named in `reset` is the job file's again.
    """

    deadline_s: float | None = None
    quorum: int | None = None
    min_devices: int | None = None
    fraction: float | None = None
    reset: tuple[str, ...] = ()
    kind: Literal["policy"] = "policy"
    scope: ClassVar[Scope] = "job"


@dataclass(frozen=True, slots=True)
class RollBack:
    """Go on from an older version: it becomes the newest, and a round begins from it.

    What has come for the open round started from what is left, and does not count.
    """

    version: int
    kind: Literal["rollback"] = "rollback"
    scope: ClassVar[Scope] = "job"


@dataclass(frozen=True, slots=True)
class Revoke:
    """Put a device out of the fleet."""

    device: str
    kind: Literal["revoke"] = "revoke"
    scope: ClassVar[Scope] = "fleet"


@dataclass(frozen=True, slots=True)
class Enrol:
    """Let a device in, once, with a token of which this is the hash; see `enrolling.enrol`."""

    device: str
    digest: str
    expires: float
    """Seconds since 1970."""
    kind: Literal["enrol"] = "enrol"
    scope: ClassVar[Scope] = "fleet"


@dataclass(frozen=True, slots=True)
class CreateJob:
    """Serve another job beside those that are served; its settings are those of a checked file."""

    job: dict[str, Any]
    """`protocol.messages.Job` as a dictionary, with its base described."""
    policy: dict[str, Any]
    kind: Literal["create"] = "create"
    scope: ClassVar[Scope] = "fleet"


JobCommand = PauseJob | ResumeJob | ChangePolicy | RollBack
FleetCommand = Revoke | Enrol | CreateJob
Command = JobCommand | FleetCommand
COMMANDS: TypeAdapter[Command] = TypeAdapter(
    Annotated[Command, Field(discriminator="kind")],
    config=ConfigDict(ser_json_inf_nan="constants"),  # or they would be taken for "not given"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a command that was done."""

    said: str
    """In words."""
    fields: dict[str, Any] = field(default_factory=dict)


def ask(
    folder: Path,
    command: Command,
    *,
    by: str,
    timeout_s: float = TIMEOUT_S,
    key: str = "",
    clock: Callable[[], float] = time.time,
) -> Answer:
    """Have the daemon of a folder do something, and return its answer.

    The folder is a job's state folder, or for a command of the whole fleet the one above. `by` says
    who asks, in events. Who asks again with the same `key` gets the same answer: it is done once.

    Raises:
        NoDaemon: nobody serves there, or it did not get to it in time, and will not.
        ControlRefused: the daemon does not do it; `code` and the words say why.
        StoreError: the database can't be used.
    """
    holder = folder_holder(folder)
    path = folder / (STORE_FILE if command.scope == "job" else FLEET_FILE)
    if holder is None or not path.exists():
        raise NoDaemon(f"no aggregator serves {folder} now; start it with `aggregator serve`")
    table = CommandTable.beside(path)
    try:
        key = key or secrets.token_hex(16)
        now = clock()
        table.put(key, COMMANDS.dump_json(command).decode(), by, at=now, expires=now + timeout_s)
        return _wait(table, key, folder, time.monotonic() + timeout_s)
    finally:
        table.close()


def _wait(table: CommandTable, key: str, folder: Path, until: float) -> Answer:
    while True:
        told = table.answer(key)
        if told.state == "done":
            return Answer(told.said, told.fields)
        if told.state == "refused":
            raise ControlRefused(told.code, told.said)
        if told.state == "withdrawn":
            raise NoDaemon("it was not done: the aggregator did not get to it in time")
        if time.monotonic() >= until or folder_holder(folder) is None:
            table.withdraw(key)  # done or withdrawn now, and never both
            until = float("inf")
        time.sleep(POLL_S)


def read_command(text: str) -> Command:
    """Return the command of a row.

    Raises:
        ControlRefused: it is none; says what is wrong.
    """
    try:
        return COMMANDS.validate_json(text)
    except ValidationError as error:
        raise ControlRefused("wrong", f"this is no command: {first_mistake(error)}") from None
