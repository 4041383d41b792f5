"""The agent: a device's part in jobs, driven by a loop: one message and one decision at a time.

Messages only change what the agent knows (`take`); what is to be done follows from that
(`advance`). Both sides of every exchange can be repeated, so a restart at any point goes on.
"""

from __future__ import annotations

from contextlib import suppress

from edge_client.config import Settings
from edge_client.discover import discover_job, enter_job, link_of
from edge_client.errors import EdgeError
from edge_client.outbox import Outbox
from edge_client.participant import Participant
from edge_client.policy.polite import noting_pauses
from edge_client.prepare import Equip, TrainingEquipment
from edge_client.standing import Standing
from edge_client.storage import keeping
from protocol.errors import TransportError
from protocol.events import EventLog
from protocol.notify import alive
from protocol.signals import stop_on_signals
from protocol.signing import SigningKey
from protocol.transport import Incoming, MqttTransport

TICK_S = 0.5


class Agent(Participant):
    """Take part in a job until it is finished or the owner stops it."""

    def __init__(
        self, settings: Settings, events: EventLog, *, equip: Equip = TrainingEquipment
    ) -> None:
        outbox = Outbox(settings.state)
        with keeping("device.key", settings.state):
            key = SigningKey.load_or_create(settings.state / "device.key")
        super().__init__(settings, events, outbox, key, equip=equip)
        self._boot = outbox.next_boot()
        self._transport: MqttTransport | None = None

    def run(self) -> bool:
        """Connect and take part; return whether there may be another job, for another agent.

        Raises:
            TransportError: the broker can't be reached, or the connection has ended for good.
            EdgeError: this device can't take part; says why.
        """
        with stop_on_signals(self._stop) as signals:
            try:
                self._find_job()
                while not (self._stopping or self._done):
                    alive()
                    incoming = self._receive()
                    if incoming is not None:
                        self.take(incoming)
                    elif self._connection.connected:
                        with noting_pauses(self._events):
                            self.advance()
            except (EdgeError, TransportError) as error:
                # Asked to stop, the agent ends what it waits for: that is no failure.
                if not self._stopping:
                    if isinstance(error, EdgeError):
                        self.say_unfit(str(error))
                    raise
            finally:
                self._close()
        self.ended = f"told to stop by {signals[0]}" if signals else self.ended or "job finished"
        return self._done and not self._stopping

    # -- start up --------------------------------------------------------------------------------

    def _find_job(self) -> None:
        """Wait for a job to be shown, then connect with the will that belongs to it."""
        settings = self._settings
        what = f"job {settings.job}" if settings.job else "a job"
        self._events.emit("state", state=f"waiting for {what}")
        job = discover_job(settings, self._key.public, lambda: self._stopping, self._waiting)
        if not job:
            return
        self._events.emit("job", name=job)
        standing = Standing(settings, job, self._boot, self._key)
        self._transport = link = link_of(settings, standing.will, self._waiting)
        self.enter(job, link, standing)
        enter_job(settings, job, link, standing, lambda: self._stopping, self._waiting)

    def _receive(self) -> Incoming | None:
        """Return the next message, if one comes soon.

        Whatever a device is told it can ask for again: no need to hold the broker up while it is
        dealt with.
        """
        assert self._transport is not None, "connected first"
        incoming = self._transport.receive(TICK_S)
        if incoming is not None:
            self._transport.ack(incoming)
        return incoming

    def _stop(self) -> None:
        """Stop now; what is trained goes on from there at the next start."""
        self._stopping = True
        if self._transport is not None:
            self._transport.abandon()
        self.polite.stop_training()

    def _close(self) -> None:
        self._equipping.pause()
        if self._learner is not None:
            self._learner.stop()
        if self._link is not None:
            if self._standing is not None and self._link.connected and not self.ended:
                with suppress(TransportError):  # the will says it then
                    self._say("stopped")
            self._link.close()
        self.close()
