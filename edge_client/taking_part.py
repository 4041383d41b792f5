"""`edge-client run`: agents, one job after the other, and a last word of why that has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from edge_client.agent import Agent
from edge_client.config import Settings
from edge_client.report import Report
from protocol.cli import Interrupted
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.files import lock_folder
from protocol.notify import notify


def take_part(settings: Settings, *, as_json: bool) -> None:
    """Take part in jobs until told to stop, or in one until it is finished, as the owner has it.

    Raises:
        TunefleetError: this device can't take part, or another has its state; says why.
    """
    with lock_folder(settings.state, "edge-client"):
        report = Report(settings.state, settings.name)
        events = EventLog(as_json=as_json, also=report.take, device=settings.name)
        notify(READY="1")
        with telling_failure(events):
            agent = Agent(settings, events)
            while agent.run():
                agent = Agent(settings, events)  # that job is finished: wait for another
            events.emit("ended", why=agent.ended)
        notify(STOPPING="1")


@contextmanager
def telling_failure(events: EventLog) -> Iterator[None]:
    """Emit why the block has ended, where that is by an error or a signal: `status` tells it."""
    try:
        yield
    except TunefleetError as error:
        events.emit("ended", why=str(error))
        raise
    except Interrupted as interrupted:
        events.emit("ended", why=f"told to stop by {Signals(interrupted.number).name}")
        raise
    except Exception as error:  # the top of the process: it ends, with a traceback
        events.emit("ended", why=f"a fault of this program ({type(error).__name__}: {error})")
        raise
