"""The loop around the jobs of a daemon: start up, serve until all is done or somebody says stop.

systemd is told when every job has been said to the broker (READY), what they are at (STATUS), and
at every turn that the loop turns (WATCHDOG). SIGHUP has the settings read again between two turns.
SIGTERM drains: what has come is committed and answered, then it ends. What comes later, the broker
keeps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from aggregator.daemon import Daemon
from aggregator.errors import MergeError
from aggregator.link import SharedLink
from protocol.errors import TransportError
from protocol.events import EventLog
from protocol.notify import alive, notify
from protocol.signals import stop_on_signals

TICK_S = 0.2
DRAIN_S = 10.0
"""The longest that what has come is taken in for, and answers are waited for, after SIGTERM."""
STATUS_EVERY_S = 2.0


class Desk(Protocol):
    """What is asked of the whole daemon is answered here, between two turns."""

    def step(self, service: Service) -> None: ...


class Service:
    """Serve jobs over one connection; `reload` reads the settings again."""

    def __init__(
        self,
        shared: SharedLink,
        jobs: Sequence[Daemon],
        events: EventLog,
        *,
        desk: Desk | None = None,
        reload: Callable[[Service], None] = lambda _: None,
        stay: bool = False,
    ) -> None:
        """Prepare; one that is to `stay` does not end with its last job."""
        self._shared = shared
        self.jobs = {daemon.job: daemon for daemon in jobs}
        self._events = events
        self._desk = desk
        self._reload = reload
        self._stay = stay
        self._stopping = self._hung_up = False
        self._on_terminal = _has_terminal()
        self._status = ""
        self._status_next = 0.0

    def run(self) -> None:
        """Serve; returns after SIGTERM, SIGINT, or the end of all jobs if so asked.

        Raises:
            TransportError: the broker can't be reached, or the connection has ended for good.
        """
        with stop_on_signals(self._stop), _on_hang_up(self._hang_up):
            try:
                for daemon in list(self.jobs.values()):
                    daemon.start()
                if not self._stopping:
                    notify(READY="1")
                while not self._ended:
                    self._turn()
                self._drain()
            except TransportError:
                # Asked to stop while the broker is away: what is unsaid is said at the next start.
                if not self._stopping:
                    raise
            finally:
                notify(STOPPING="1")
                self._shared.link.close()

    def add(self, daemon: Daemon) -> None:
        """Serve one more job from now on."""
        self.jobs[daemon.job] = daemon
        daemon.start()

    @property
    def connected(self) -> bool:
        return self._shared.link.connected

    @property
    def _ended(self) -> bool:
        return self._stopping or (not self._stay and not self.jobs)

    # -- a turn ----------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Take in what has come, waiting a moment for it, and do what is due, job by job."""
        self._shared.sort_next(TICK_S)
        for daemon in list(self.jobs.values()):
            daemon.serve(0)
            try:
                daemon.step()
            except MergeError as error:
                if not self._stay:
                    raise
                daemon.hold(error)
            if daemon.stopping and not self._stopping:  # its job is done
                del self.jobs[daemon.job]
        if self._desk is not None:
            self._desk.step(self)
        if self._hung_up:
            self._hung_up = False
            self._reload(self)
        alive()
        self._tell()

    def _tell(self) -> None:
        """Tell systemd what the jobs are at, when that is news."""
        now = time.monotonic()
        if now < self._status_next:
            return
        self._status_next = now + STATUS_EVERY_S
        said = "; ".join(daemon.standing for daemon in self.jobs.values()) or "no job is served"
        if said != self._status:
            self._status = said
            notify(STATUS=said)

    # -- being told to stop ----------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopping = True
        for daemon in self.jobs.values():
            daemon.stop()
        self._shared.link.abandon()

    def _hang_up(self) -> None:
        if self._on_terminal and not _has_terminal():
            self._stop()  # its window was closed
        else:
            self._hung_up = True

    def _drain(self) -> None:
        """Commit and answer what has come; wait for the broker to have the answers."""
        link, until = self._shared.link, time.monotonic() + DRAIN_S
        notify(STATUS="draining: what has come is committed and answered")
        before = self._taken_in
        while self._stopping and link.connected and time.monotonic() < until:
            if self._shared.sort_next(0) is None and not self._shared.has_messages:
                break
            for daemon in self.jobs.values():
                daemon.take_in_next()
        while link.awaited and link.connected and time.monotonic() < until:
            time.sleep(0.02)
        if self._stopping:
            self._events.emit("stopped", drained=self._taken_in - before)

    @property
    def _taken_in(self) -> int:
        return sum(daemon.taken_in for daemon in self.jobs.values())


def _has_terminal() -> bool:
    """Say whether this process has a terminal that still is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextmanager
def _on_hang_up(reload: Callable[[], None]) -> Iterator[None]:
    """Call `reload` on SIGHUP inside the block; restore its handler after it."""
    before = signal.signal(signal.SIGHUP, lambda *_: reload())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
