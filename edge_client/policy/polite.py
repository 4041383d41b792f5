"""What an agent asks before it trains or transfers, and between the steps of its training."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime

import psutil

from edge_client.config import Settings
from edge_client.errors import TrainingPaused
from edge_client.outbox import Outbox
from edge_client.policy.decide import FREE, Activity, DeviceState, Reason, decide
from edge_client.policy.owner import Policy
from edge_client.policy.senses import Senses
from edge_client.policy.sensors import Sensors
from edge_client.policy.used import Usage
from edge_client.trainer.process import end_training
from protocol.events import EventLog

LOOK_S = 0.05
"""The device's state is read as often at most."""
STEP_ENDS_S = 10.0
"""How long a step may take that is under way when the agent is told to stop."""
RELEASE_S = 600.0
"""After so long a wait the training process ends, and gives its memory back."""

Also = Callable[[], Reason | None]
"""A further reason not to train now, beside the owner's policy; None: there is none."""


class Polite:
    """Hold an agent to its owner's policy, and to whatever `also` says.

    `stopping` says whether the agent has been told to end: training then pauses too. `now` is the
    local time, `clock` counts seconds, and `read` says how the device is: by default it is asked.
    """

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        stopping: Callable[[], bool],
        events: EventLog,
        *,
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[Policy], DeviceState] | None = None,
        also: Sequence[Also] = (),
    ) -> None:
        self.usage = Usage(outbox, now, clock)
        self.stepping = False
        """Whether training is between its first step and its last."""
        self._ending = False
        self._policy, self._now, self._clock = settings.policy, now, clock
        self._stopping, self._events, self._also = stopping, events, also
        own = Sensors(settings.system_root, pids=_own_processes)
        self._read = read or own.read
        self._decision = FREE
        self._looked = float("-inf")
        self._said: frozenset[str] = frozenset()
        self._waiting_since: dict[Activity, float] = {}
        _give_way(self._policy)

    @classmethod
    def of(
        cls,
        settings: Settings,
        outbox: Outbox,
        stopping: Callable[[], bool],
        events: EventLog,
        senses: Senses,
        also: Sequence[Also],
    ) -> Polite:
        """Hold an agent to its policy by what `senses` tell."""
        return cls(
            settings,
            outbox,
            stopping,
            events,
            now=senses.now,
            clock=senses.clock,
            read=senses.state,
            also=also,
        )

    def against(self, activity: Activity) -> tuple[Reason, ...]:
        """Return what speaks against doing something now; nothing: it may be done."""
        if self._clock() - self._looked >= LOOK_S:
            state = self._read(self._policy)
            used = self.usage.today()
            self._decision = decide(self._policy, state, self._now(), used, self._decision)
            self._looked = self._clock()
        more = [reason for ask in self._also if (reason := ask())] if activity == "train" else []
        reasons = (*self._decision.against(activity), *more)
        if not reasons:
            self._waiting_since.pop(activity, None)
        else:
            self._waiting_since.setdefault(activity, self._clock())
        return reasons

    def is_news(self, reasons: Sequence[Reason]) -> bool:
        """Say whether reasons are other ones than the last that this was asked about."""
        kinds = frozenset(reason.kind for reason in reasons)
        before, self._said = self._said, kinds
        return kinds != before

    def wants_memory(self, reasons: Sequence[Reason]) -> bool:
        """Say whether the training process is to end while these reasons last."""
        first = min(self._waiting_since.values(), default=math.inf)
        long = self._clock() - first > RELEASE_S
        return long or any(reason.wants_memory for reason in reasons)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Take the block for the steps of one training."""
        self.stepping, self._step_began = True, self._clock()
        try:
            yield
        finally:
            self.stepping = False

    def stop_training(self) -> None:
        """End training: at once, or after the step that it is at, if that does not take long.

        For a signal's handler; the second call ends it where it is.
        """
        if self.stepping and not self._ending:
            self._ending = True
            timer = threading.Timer(STEP_ENDS_S, end_training)
            timer.daemon = True
            timer.start()
        else:
            end_training()

    def pause_after_step(self) -> bool:
        """Count a step that is done, and say whether to pause before the next."""
        began, self._step_began = self._step_began, self._clock()
        self.usage.note_training(self._step_began - began)
        return self._stopping() or bool(self.against("train"))

    def note_unkept(self, why: str) -> None:
        """Note that a training can't be written down: a kill would lose it."""
        self._events.emit("unkept", why=why)


@contextmanager
def noting_pauses(events: EventLog) -> Iterator[None]:
    """End the block where its training pauses, and note that; what is done next says why."""
    try:
        yield
    except TrainingPaused as paused:
        events.emit("paused", steps=paused.steps, lost=paused.unkept)


def _own_processes() -> list[int]:
    children = (child.pid for child in multiprocessing.active_children())
    return [os.getpid(), *(pid for pid in children if pid is not None)]


def _give_way(policy: Policy) -> None:
    """Take the owner's priorities, which the training process inherits; none is ever raised."""
    this = psutil.Process()
    with suppress(psutil.Error, OSError):
        if policy.nice is not None and policy.nice > this.nice():
            this.nice(policy.nice)
    if policy.io == "idle" and hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        with suppress(psutil.Error, OSError):
            this.ionice(psutil.IOPRIO_CLASS_IDLE)
