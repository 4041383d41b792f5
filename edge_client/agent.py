"""The agent: a device's part of the protocol, one message and one decision at a time.

    job → plan → version → (try others) → train → outbox → upload → done → next round … finished

Messages only change what the agent knows (`_take`); what is to be done follows from that
(`_advance`). Both sides of every exchange can be repeated, so a restart at any point goes on.
"""

from __future__ import annotations

from contextlib import suppress

from edge_client.adapters import Adapters
from edge_client.config import Settings
from edge_client.discover import discover_job, enter_job, link_of
from edge_client.download import Source
from edge_client.equipping import Equipping
from edge_client.errors import EdgeError
from edge_client.holding import Holding, goes_on_with
from edge_client.learner import Learning
from edge_client.outbox import Outbox
from edge_client.own_changes import OwnChanges
from edge_client.personal import make_answer
from edge_client.plan import Plan
from edge_client.policy.decide import Activity
from edge_client.policy.memory import ShortMemory
from edge_client.policy.polite import Polite, noting_pauses, training_mib
from edge_client.prepare import Equip, Equipment, TrainingEquipment
from edge_client.private import Private
from edge_client.result import conclude
from edge_client.sender import Sender
from edge_client.standing import Standing
from edge_client.storage import keeping
from edge_client.trainer import checkpoint
from edge_client.trust import open_trusted
from protocol import topics
from protocol.errors import ProtocolError, TransportError
from protocol.events import EventLog
from protocol.messages import Control, Job, Round, in_cohort
from protocol.notify import alive
from protocol.patience import Waiting
from protocol.signals import stop_on_signals
from protocol.signing import SigningKey
from protocol.transport import Incoming, MqttTransport

TICK_S = 0.5


class Agent:
    """Take part in a job until it is finished or the owner stops it."""

    def __init__(
        self, settings: Settings, events: EventLog, *, equip: Equip = TrainingEquipment
    ) -> None:
        self._settings, self._events = settings, events
        self.ended = ""
        """Why `run` has returned."""
        self._outbox = Outbox(settings.state)
        with keeping("device.key", settings.state):
            self._key = SigningKey.load_or_create(settings.state / "device.key")
        self._boot = self._outbox.next_boot()
        self._stopping = self._done = False
        self._waiting = Waiting(events)
        short = ShortMemory(settings.system_root, training_mib)
        self._polite = Polite(settings, self._outbox, lambda: self._stopping, events, also=[short])
        used = self._polite.usage.note_download
        self._equipping = Equipping(settings, equip, events, self._waiting, used)
        self._link: MqttTransport | None = None
        self._standing: Standing | None = None
        self._job_name = ""
        self._offered: Job | None = None
        self._job: Job | None = None
        self._round: Round | None = None
        self._begun: Round | None = None
        """What has been begun to be trained for and is not done: it may have been paused."""
        self._equipment: Equipment | None = None
        self._plan: Plan | None = None
        self._rank_start = 0
        self._learner: Learning | None = None
        self._private: Private | None = None
        self._adapters: Adapters | None = None
        self._base_loss = float("nan")
        self._evaluated: tuple[Source | None, float] = None, self._base_loss
        self._tokens = 0

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
                    incoming = self._connection.receive(TICK_S)
                    if incoming is not None:
                        # Whatever a device is told it can ask for again: no need to hold the
                        # broker up while it is dealt with.
                        self._connection.ack(incoming)
                        self._take(incoming)
                    elif self._connection.connected:
                        with noting_pauses(self._events):
                            self._advance()
            except (EdgeError, TransportError) as error:
                # Asked to stop, the agent ends what it waits for: that is no failure.
                if not self._stopping:
                    said = self._link is not None and self._link.connected
                    if said and isinstance(error, EdgeError):
                        self._say("unfit", detail=str(error))
                    raise
            finally:
                self._close()
        self.ended = f"told to stop by {signals[0]}" if signals else self.ended or "job finished"
        return self._done and not self._stopping

    # -- start up --------------------------------------------------------------------------------

    @property
    def _connection(self) -> MqttTransport:
        assert self._link is not None, "connected first"
        return self._link

    def _find_job(self) -> None:
        """Wait for a job to be shown, then connect with the will that belongs to it."""
        settings = self._settings
        what = f"job {settings.job}" if settings.job else "a job"
        self._events.emit("state", state=f"waiting for {what}")
        job = discover_job(settings, self._key.public, lambda: self._stopping, self._waiting)
        if not job:
            return
        self._job_name = job
        self._events.emit("job", name=job)
        self._standing = Standing(settings, job, self._boot, self._key)
        self._link = link_of(settings, self._standing.will, self._waiting)
        self._sender = Sender(self._link, self._key, self._outbox, self._events)
        enter_job(settings, job, self._link, self._standing, lambda: self._stopping, self._waiting)

    def _begin(self) -> None:
        """Plan for a job and load its base model, if it may; an unfit device says so and ends."""
        job = self._offered
        if self._job is not None or job is None:
            return
        if not self._may(self._equipping.needs):
            self._equipping.pause()
            return
        equipment = self._equipping.equipment(job, self._connection, lambda: self._may("transfer"))
        if equipment is None:  # what it takes is being fetched
            return
        self._job, self._equipment = job, equipment
        self._events.emit("state", state="planning", detail="measuring, minutes the first time")
        self._plan = plan = self._make_plan(job.job)
        self._learner = learner = self._equipment.learner(plan, self._step_down, self._polite)
        self._rank_start = plan.rank
        settings, link, events = self._settings, self._connection, self._events
        if rank := settings.private_rank:
            self._private = Private(job, settings.name, rank, settings.state, events)
        self._adapters = Adapters(
            settings, job, link, self._outbox, learner, events, reach=self._reach
        )
        for problem in learner.text.problems[:20]:
            events.emit("skipped", where=problem)
        tokens = learner.text.train_tokens
        whose = {"profile": settings.profile.name, "plan": str(plan), "train_tokens": tokens}
        events.emit("plan", **whose, **plan.as_dict())
        self._base_loss = learner.evaluate(None)
        self._events.emit("base", loss=self._base_loss)
        self._say("idle")

    def _make_plan(self, job: str) -> Plan:
        assert self._equipment is not None
        return self._equipment.plan(below_mib=self._outbox.ceiling_mib(job))

    def _step_down(self, before: Plan, why: str) -> Plan:
        """Take a smaller plan in place of one under which training was killed for its memory."""
        if self._stopping:
            raise EdgeError("training was killed to stop")  # by `_stop`: no plan was too much
        assert self._job is not None
        self._outbox.lower_ceiling(self._job.job, before.predicted_mib)
        plan = self._make_plan(self._job.job)
        self._events.emit(
            "stepped-down",
            why=why,
            before=str(before),
            plan=str(plan),
            predicted_before_mib=before.predicted_mib,
            predicted_mib=plan.predicted_mib,
        )
        self._plan = plan
        if self._adapters is not None:
            self._adapters.truncate(plan.held)
        return plan

    # -- what messages change --------------------------------------------------------------------

    def _take(self, incoming: Incoming) -> None:
        try:
            state = self._settings.state
            found = topics.match(incoming.topic)
            if found.fields["job"] != self._job_name:
                return
            if not incoming.payload:
                if found.kind == "job":
                    self._leave()
                return
            if self._adapters is not None and self._adapters.expects(found):
                assert self._round is not None, "which needs it"
                self._adapters.take(found, incoming, self._round)
            elif self._equipping.expects(found):
                self._equipping.take(found, incoming)
            elif found.kind == "job":
                self._on_job(open_trusted(incoming, Job, state))
            elif found.kind == "round":
                self._on_round(open_trusted(incoming, Round, state))
            elif found.kind == "status" and self._standing is not None:
                self._standing.hear(self._connection, incoming.payload)
            elif found.kind == "control":
                self._on_control(open_trusted(incoming, Control, state))
        except ProtocolError as error:
            self._events.emit("refused", topic=incoming.topic, reason=str(error))

    def _leave(self) -> None:
        """Leave a job that has been taken off the broker; what is in the outbox stays there."""
        self._events.emit("withdrawn", job=self._job_name)
        self.ended, self._done = f"job {self._job_name!r} was withdrawn", True
        self._stopping = self._stopping or self._settings.exit_when_done

    def _on_job(self, job: Job) -> None:
        self._outbox.check_job(job)
        self._offered = job
        self._begin()

    def _on_round(self, now: Round) -> None:
        self._outbox.check_round(now)
        before, self._round = self._round, now
        if before is None or (now.number, now.attempt) != (before.number, before.attempt):
            rounds = self._offered.rounds if self._offered else 0
            self._events.emit("round", round=now.number, attempt=now.attempt, rounds=rounds)
        # It may be said again by an aggregator that has missed what was offered to it.
        self._sender.offer_again()

    def _on_control(self, message: Control) -> None:
        if message.kind == "need" and not self._may("transfer"):
            self._sender.offer_again()  # when it may: then it is asked for once more
            return
        if not self._sender.take(message):
            return
        self._bytes()
        if self._job is not None:  # the answer to an update from before a restart comes first
            self._say("idle")

    # -- what is to be done ----------------------------------------------------------------------

    def _advance(self) -> None:
        self._polite.usage.note_link(self._connection)
        self._begin()
        adapters = self._adapters
        if adapters is None or self._round is None or self._learner is None:
            return
        now = goes_on_with(self._begun, self._round)
        pending = self._outbox.pending(self._job_name)  # those of another can't be answered here
        if adapters.needs(now) or pending:
            if not self._may("transfer"):
                return
            if adapters.fetch_next(now):
                adapters.wait(now)
            elif pending:
                self._sender.offer(pending[0])
        elif (
            now.state == "open"
            and self._outbox.is_due(now)
            and in_cohort(self._settings.name, now.job, now.number, now.fraction)
        ):
            if self._may("train"):
                self._train(now, self._learner, adapters)
        elif now.state == "finished" and self._may("train"):
            if self._private is not None and self._private.is_due(now):
                assert adapters.held.adapter is not None, "its version is there"
                self._private.train(self._learner, adapters.held.adapter)
            else:
                self._finish(self._learner, adapters.held)

    def _may(self, activity: Activity) -> bool:
        """Ask whether the owner allows something now; a device that waits says for what."""
        self._polite.usage.note_link(self._connection)
        reasons = self._polite.against(activity)
        if self._polite.is_news(reasons):
            state = "waiting" if reasons else "idle" if self._plan else "planning"
            self._say(state, detail="; ".join(reason.detail for reason in reasons))
        if reasons and self._learner is not None and self._polite.wants_memory(reasons):
            self._learner.stop()
        return not reasons

    def _train(self, now: Round, learner: Learning, adapters: Adapters) -> None:
        """Train for a round, once everything that it offers has been tried."""
        if adapters.begin_trying(now):
            adapters.fetch_next(now)
            return
        held, job, adapter = adapters.held, adapters.held.job, adapters.held.adapter
        assert adapter is not None, "its version is there"
        self._begun = now
        if self._evaluated[0] != held.source:  # training that goes on after a pause has been here
            loss = self._base_loss if adapter.is_zero else learner.evaluate(adapter)
            self._evaluated = held.source, loss
        loss = self._evaluated[1]
        self._events.emit("evaluated", round=now.number, loss=loss, adapter=str(held.source))
        self._say("training", detail=f"with {held.source}")

        def on_step(step: int, loss: float) -> None:
            told = {"step": step, "steps": job.training.steps, "loss": round(loss, 4)}
            self._events.emit("step", round=now.number, **told)

        drawn = self._outbox.drawn_rows(now.job)
        place = {"round_number": now.number, "attempt": now.attempt, "drawn_rows": drawn}
        learned = learner.train(adapter, rank=self._rank, **place, on_step=on_step)
        self._tokens += learned.report.tokens
        if cut := learned.pruned():
            self._events.emit("pruned", round=now.number, **cut)
        trust = adapters.trying.answer() if adapters.trying is not None else None
        manifest, data, own_loss = make_answer(
            now, held, learned, learner, held_out_loss=loss, trust=trust
        )
        if job.is_personal:
            OwnChanges(job, self._settings.state).note(now.number, adapter, learned)
        drawn = learned.report.drawn_rows
        self._outbox.put(manifest, data, rank=learned.rank, own_loss=own_loss, drawn_rows=drawn)
        checkpoint.forget(self._settings.state)
        self._begun = None
        self._say("uploading")
        if self._may("transfer"):
            self._sender.offer(manifest.upload)

    def _finish(self, learner: Learning, held: Holding) -> None:
        """Keep the result, report, compare if asked, and end or wait for another job."""
        assert held.adapter is not None and self._plan is not None
        result = conclude(
            self._settings.state,
            learner,
            held,
            self._events,
            base_loss=self._base_loss,
            alone_rank=self._rank_start if self._settings.compare_alone else None,
            private=self._private,
        )
        floor_mib, peak_mib = learner.memory()
        self._bytes()
        self._say("stopped", detail="the job is finished")
        self._events.emit(
            "finished",
            **result,
            rank_start=self._rank_start,
            rank_end=self._rank,
            held_rank=held.adapter.rank,
            floor_mib=floor_mib,
            predicted_mib=self._plan.predicted_mib,
            peak_mib=peak_mib,
            tokens=self._tokens,
            bytes_up=self._connection.bytes_sent,
            bytes_down=self._connection.bytes_received,
        )
        self._stopping = self._stopping or self._settings.exit_when_done
        self._done = not self._settings.job  # told which job, it stays with that one
        learner.stop()
        self._learner = None

    # -- small things ----------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        """The rank now: the plan's, or what self-pruning has left of it."""
        assert self._plan is not None and self._job is not None
        return min(self._plan.rank, self._outbox.rank(self._job.job, self._plan.rank))

    def _reach(self) -> tuple[int, int]:
        """The rank now, and how many directions the device can hold."""
        assert self._plan is not None
        return self._rank, self._plan.held

    def _say(self, state: str, *, detail: str = "") -> None:
        """Publish this device's status, and tell whoever watches."""
        assert self._standing is not None, "connected first"
        rank = self._rank if self._plan else 0
        version = self._adapters.held.version if self._adapters else None
        self._standing.announce(self._connection, state, rank=rank, version=version, detail=detail)
        self._events.emit("state", state=state, **({"detail": detail} if detail else {}))

    def _bytes(self) -> None:
        self._events.emit(
            "bytes", up=self._connection.bytes_sent, down=self._connection.bytes_received
        )

    def _stop(self) -> None:
        """Stop now; what is trained goes on from there at the next start."""
        self._stopping = True
        if self._link is not None:
            self._link.abandon()
        self._polite.stop_training()

    def _close(self) -> None:
        self._equipping.pause()
        if self._learner is not None:
            self._learner.stop()
        if self._link is not None:
            if self._standing is not None and self._link.connected and not self.ended:
                with suppress(TransportError):  # the will says it then
                    self._say("stopped")
            self._link.close()
        self._polite.usage.keep()
        self._outbox.close()
