"""What commands do to one job: each in one transaction with its answer, then told to everybody."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from aggregator import steering
from aggregator.commands import Waiting
from aggregator.config import PolicySettings
from aggregator.control import ChangePolicy, Command, PauseJob, ResumeJob, RollBack, read_command
from aggregator.errors import ControlRefused
from aggregator.rounds import Policy, RoundState
from aggregator.steering import Steering
from aggregator.store import Store
from aggregator.versions import Versions
from aggregator.view.words import duration
from protocol.errors import TunefleetError, os_words
from protocol.events import EventLog
from protocol.messages import GlobalManifest, Job
from protocol.mistakes import first_mistake


@dataclass(frozen=True, slots=True)
class Done:
    """What a command has changed."""

    said: str
    fields: dict[str, Any]
    version: GlobalManifest | None = None
    """One that is new with it."""


class Operator:
    """Answer the commands to one job; `policy` is what its file says of rounds."""

    def __init__(
        self,
        job: Job,
        policy: Policy,
        store: Store,
        versions: Versions,
        events: EventLog,
        clock: Callable[[], float],
    ) -> None:
        self._job = job
        self.policy = policy
        self._store = store
        self._versions = versions
        self._events = events
        self._clock = clock

    def step(self) -> list[Done]:
        """Answer what is waiting; return what has changed, which is committed."""
        return [done for one in self._store.commands.waiting() if (done := self._answer(one))]

    def _answer(self, asked: Waiting) -> Done | None:
        name = ""
        try:
            command = read_command(asked.command)
            name = command.kind
            if self._clock() > asked.expires:
                raise ControlRefused("late", "nobody waits for it any more: nothing was changed")
            done = self._do(command, asked.key)
        except ControlRefused as error:
            self._store.commands.settle(
                asked.key, "refused", code=error.code, said=str(error), at=self._clock()
            )
            told = {"command": name, "by": asked.by, "code": error.code, "reason": str(error)}
            self._events.emit("command-refused", **told)
            return None
        if done is None:
            return None
        self._events.emit("command", command=name, by=asked.by, said=done.said, **done.fields)
        return done

    def _do(self, command: Command, key: str) -> Done | None:
        """Do what a command says and answer it; None if it was taken back meanwhile."""
        written = self._older(command) if isinstance(command, RollBack) else None
        with self._store.transaction():
            if not self._store.commands.is_waiting(key):
                return None
            done = self._change(command, written)
            fields = json.dumps(done.fields)
            self._store.commands.settle(
                key, "done", said=done.said, fields=fields, at=self._clock()
            )
        return done

    def _change(self, command: Command, written: GlobalManifest | None) -> Done:
        now, before = self._store.round(), self._store.steering()
        if isinstance(command, PauseJob):
            if before.paused is not None:
                raise ControlRefused("state", f"job {self._job.job!r} is paused already")
            self._store.set_steering(replace(before, paused=self._clock()))
            return Done("paused: what comes is still counted, no round ends or begins", {})
        if isinstance(command, ResumeJob):
            return self._resume(now, before)
        if isinstance(command, ChangePolicy):
            return self._redirect(command, now, before)
        if written is not None:
            return self._roll_back(now, written)
        raise ControlRefused("wrong", f"{command.kind!r} is no command to a job")

    def _resume(self, now: RoundState, before: Steering) -> Done:
        if before.paused is None:
            raise ControlRefused("state", f"job {self._job.job!r} is not paused")
        after, kept = steering.resumed(now, before, self._clock())
        self._store.set_steering(kept)
        self._store.set_round(after)
        paused_s = round(self._clock() - before.paused, 1)
        return Done(f"goes on after {duration(paused_s)}", {"paused_s": paused_s})

    def _redirect(self, command: ChangePolicy, now: RoundState, before: Steering) -> Done:
        known = ", ".join(steering.CHANGEABLE)
        settings: dict[str, float | int | None] = {}
        for name in steering.CHANGEABLE:
            if (value := getattr(command, name)) is not None:
                settings[name] = value
        for name in command.reset:
            if name not in steering.CHANGEABLE or name in settings:
                raise ControlRefused("wrong", f"reset: {name!r} is not one of {known}, or set too")
            settings[name] = None
        if not settings:
            raise ControlRefused("wrong", f"nothing is to be changed: name one of {known}")
        after, kept = steering.redirected(
            now, before, before.policy(self.policy), self.policy, settings
        )
        policy = kept.policy(self.policy)
        try:
            fields = PolicySettings.of(policy)
            asked = fields if policy.buffer else settings  # a buffer limits other settings
            PolicySettings.model_validate({name: fields[name] for name in asked})
        except ValidationError as error:
            raise ControlRefused("wrong", first_mistake(error)) from None
        self._store.set_steering(kept)
        self._store.set_round(after)
        told = {name: getattr(policy, name) for name in settings}
        return Done(", ".join(f"{name} = {value:g}" for name, value in told.items()), told)

    # -- roll back -------------------------------------------------------------------------------

    def _older(self, command: RollBack) -> GlobalManifest:
        """Write an older version as the newest; committing it is the caller's."""
        now, number = self._store.round(), command.version
        if self._job.is_personal:
            raise ControlRefused(
                "state",
                f"rule {self._job.rule!r} gives devices adapters of their own, which can't be "
                "rolled back",
            )
        if number == now.version:
            raise ControlRefused("state", f"version {number} is the newest already")
        if self._store.version(number) is None:
            kept = sorted(int(v) for v in self._store.version_numbers())
            there = ", ".join(map(str, kept)) or "none"
            raise ControlRefused("unknown", f"version {number} is not kept; there are {there}")
        try:
            adapter = self._versions.load(number)
            return self._versions.write(adapter, version=now.version + 1, parent=number)
        except (OSError, TunefleetError) as error:  # damaged, or a full disk: the job goes on
            raise ControlRefused(
                "failed", f"can't go back to version {number}: {os_words(error)}"
            ) from None

    def _roll_back(self, now: RoundState, written: GlobalManifest) -> Done:
        older = written.parent
        note = f"rolled back to version {older}"
        ends = now.state == "open" and now.number >= self._job.rounds
        after = replace(now, version=written.version, attempt=0)
        if now.state == "open":
            policy = self._store.steering().policy(self.policy)
            deadline = self._clock() + policy.deadline_s
            after = replace(after, number=now.number + 1, deadline=deadline)
        if ends:
            after = replace(now, state="finished", version=written.version, deadline=None)
        self._store.begin_anew(after, written, ended=now, note=note)
        said = f"version {written.version} is version {older} again"
        if now.state == "open":
            said += f"; round {now.number} ended without a merge"
        told = {"version": written.version, "of": older, "round": after.number}
        return Done(said, told, written)
