"""A device's part in one job: what it knows, what messages change of that, and what follows.

    job → plan → version → (try others) → train → outbox → upload → done → next round … finished

Nothing here waits, but for what it learns with and a link that does. `Agent` drives it on a device,
with a loop of its own; a replay drives thousands from one.
"""

from __future__ import annotations

from edge_client.adapters import Adapters
from edge_client.config import Settings
from edge_client.download import Source
from edge_client.equipping import Equipping
from edge_client.errors import NoPlanFits
from edge_client.holding import Holding, goes_on_with
from edge_client.learning import Learning, Place
from edge_client.outbox import Outbox
from edge_client.own_changes import OwnChanges
from edge_client.personal import make_answer
from edge_client.plans import Plans
from edge_client.policy.decide import Activity, Reason
from edge_client.policy.memory import ShortMemory
from edge_client.policy.polite import Also, Polite
from edge_client.policy.senses import OWN, Senses
from edge_client.prepare import Equip, TrainingEquipment
from edge_client.private import Private
from edge_client.result import conclude
from edge_client.sender import Sender
from edge_client.standing import Standing
from edge_client.trainer import checkpoint
from edge_client.trust import open_trusted
from protocol import topics
from protocol.cohort import in_cohort
from protocol.errors import ProtocolError
from protocol.events import EventLog
from protocol.link import DeviceLink, Incoming
from protocol.messages import Control, Job, Round
from protocol.patience import Waiting
from protocol.signing import SigningKey


class Participant:
    """Take part in one job, told of messages and asked what is to be done.

    `equip` gives it what it learns with, `senses` the time and its device's state, `also` further
    reasons not to train.
    """

    def __init__(
        self,
        settings: Settings,
        events: EventLog,
        outbox: Outbox,
        key: SigningKey,
        *,
        equip: Equip = TrainingEquipment,
        senses: Senses = OWN,
        also: tuple[Also, ...] = (),
    ) -> None:
        self._settings, self._events = settings, events
        self._outbox, self._key, self._senses = outbox, key, senses
        self.ended = ""
        """Why its part is over."""
        self._stopping = self._done = False
        self.reasons: tuple[Reason, ...] = ()
        """What spoke against what it last wanted to do."""
        self._waiting = Waiting(events)
        self._short = ShortMemory.of(settings, senses)
        self.polite = Polite.of(
            settings, outbox, lambda: self._stopping, events, senses, (self._short, *also)
        )
        used = self.polite.usage.note_download
        self._equipping = Equipping(settings, equip, events, self._waiting, used)
        self._link: DeviceLink | None = None
        self._standing: Standing | None = None
        self._job_name = ""
        self._offered: Job | None = None
        self._job: Job | None = None
        self._round: Round | None = None
        self._begun: Round | None = None  # to be trained for: it may have been paused
        self._plans: Plans | None = None
        self._rank_start = 0
        self._learner: Learning | None = None
        self._private: Private | None = None
        self._adapters: Adapters | None = None
        self._base_loss = float("nan")
        self._evaluated: tuple[Source | None, float] = None, self._base_loss
        self._tokens = 0
        self._planned_for: tuple[int, int, str] | None = None
        """The round's attempt, and what of it, that it has planned anew for, where it does that."""

    def enter(self, job: str, link: DeviceLink, standing: Standing) -> None:
        """Take part in a job over a link, which is connected later."""
        self._job_name, self._link, self._standing = job, link, standing
        self._sender = Sender(link, self._key, self._outbox, self._events, self._senses.clock)

    @property
    def outstanding(self) -> int:
        """How many messages of an adapter are to come yet."""
        return self._adapters.outstanding if self._adapters is not None else 0

    @property
    def held(self) -> Holding | None:
        """What it holds of the job's adapters, once it takes part."""
        return self._adapters.held if self._adapters is not None else None

    @property
    def is_busy(self) -> bool:
        """Whether it has something under way that the broker or the aggregator is to answer."""
        return self.outstanding > 0 or bool(self._outbox.pending(self._job_name))

    def say_unfit(self, why: str) -> None:
        """Tell the job that this device can't take part, where it is connected."""
        if self._link and self._link.connected:
            self._say("unfit", detail=why)

    def close(self) -> None:
        """Let go of what it learns with, and of its outbox."""
        if self._learner is not None:
            self._learner.stop()
        self.polite.usage.keep()
        self._outbox.close()

    @property
    def _connection(self) -> DeviceLink:
        assert self._link is not None, "entered first"
        return self._link

    def _begin(self) -> None:
        """Plan for a job and load its base model, if it may; an unfit device says so and ends."""
        job = self._offered
        if self._job is not None or job is None:
            return
        if not self.may(self._equipping.needs):
            self._equipping.pause()
            return
        equipment = self._equipping.equipment(job, self._connection, lambda: self.may("transfer"))
        if equipment is None:  # what it takes is being fetched
            return
        self._job = job
        self._events.emit("state", state="planning", detail="measuring, minutes the first time")
        self._plans = plans = Plans(
            job, equipment, self._outbox, self._events, lambda: self._stopping, self._hold
        )
        plan = plans.now
        self._learner = learner = equipment.learner(plan, plans.step_down, self.polite)
        self._rank_start = plan.rank
        settings, events = self._settings, self._events
        if rank := settings.private_rank:
            self._private = Private(job, settings.name, rank, settings.state, events)
        self._adapters = Adapters(
            settings,
            job,
            self._connection,
            self._outbox,
            learner,
            events,
            plans.reach,
            self._senses.download_bytes,
        )
        for problem in learner.text.problems[:20]:
            events.emit("skipped", where=problem)
        whose = {"profile": settings.profile.name, "plan": str(plan)}
        events.emit("plan", **whose, train_tokens=learner.text.train_tokens, **plan.as_dict())
        self._base_loss = learner.evaluate(None)
        events.emit("base", loss=self._base_loss)
        self._say("idle")

    def _hold(self, held: int) -> None:
        if self._adapters is not None:
            self._adapters.truncate(held)

    def _has_plan_for(self, now: Round, what: str, learner: Learning) -> bool:
        """Plan anew as a round begins and as its training does, where this device does that."""
        place = now.number, now.attempt, what
        later = self._planned_for == (now.number, now.attempt, "training")
        if not self._senses.plans_anew or later or self._planned_for == place:
            return True
        if why := self._plan_anew(learner):
            if self.polite.is_news([Reason("plan", why)]):
                self._say("waiting", detail=why)
            return False
        self._planned_for = place
        return True

    def _plan_anew(self, learner: Learning) -> str:
        """Plan by what memory there is now; return why none fits, empty where one does."""
        assert self._plans is not None
        try:
            if (plan := self._plans.anew()) is not None:
                learner.use(plan)
        except NoPlanFits as error:
            return str(error)
        self._short.expect(self._senses.needs_mib(self._plans.now))
        return ""

    # -- what messages change --------------------------------------------------------------------

    def take(self, incoming: Incoming) -> None:
        """Take in a message, which changes what is known; what does not fit is told of."""
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
        if message.kind == "need" and not self.may("transfer"):
            self._sender.offer_again()  # when it may: then it is asked for once more
            return
        if not self._sender.take(message):
            return
        self._bytes()
        if self._job is not None:  # the answer to an update from before a restart comes first
            self._say("idle")

    # -- what is to be done ----------------------------------------------------------------------

    def advance(self) -> None:
        """Do what is to be done next, as far as it may be now.

        Raises:
            EdgeError: its training has paused, or it can't take part any more; says why.
        """
        self.polite.usage.note_link(self._connection)
        self._begin()
        adapters, newest = self._adapters, self._round
        if adapters is None or newest is None or self._learner is None:
            return
        now = goes_on_with(self._begun, newest)
        if not self._has_plan_for(now, "fetching", self._learner):
            return
        pending = self._outbox.pending(self._job_name)  # those of another can't be answered here
        if adapters.needs(now) or pending:
            if not self.may("transfer"):
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
            if self.may("train") and self._has_plan_for(now, "training", self._learner):
                self._train(now, self._learner, adapters)
        elif now.state == "finished" and self.may("train"):
            if self._private is not None and self._private.is_due(now):
                assert adapters.held.adapter is not None, "its version is there"
                self._private.train(self._learner, adapters.held.adapter)
            else:
                self._finish(self._learner, adapters.held)

    def may(self, activity: Activity) -> bool:
        """Ask whether the owner allows something now; a device that waits says for what."""
        self.polite.usage.note_link(self._connection)
        self.reasons = reasons = self.polite.against(activity)
        if self.polite.is_news(reasons):
            state = "waiting" if reasons else "idle" if self._plans else "planning"
            self._say(state, detail="; ".join(reason.detail for reason in reasons))
        if reasons and self._learner is not None and self.polite.wants_memory(reasons):
            self._learner.stop()
            if self._senses.plans_anew and self._adapters is not None:
                self._plan_anew(self._learner)
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

        place = Place(now.number, now.attempt, self._outbox.drawn_rows(now.job))
        learned = learner.train(adapter, self._rank, place, on_step)
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
        rank = learned.rank
        if not cut:  # a plan alone may have kept it lower than what pruning has left
            rank = max(rank, self._outbox.rank(now.job, job.rank))
        self._outbox.put(manifest, data, rank=rank, own_loss=own_loss, drawn_rows=drawn)
        checkpoint.forget(self._settings.state)
        self._begun = None
        self._say("uploading")
        if self.may("transfer"):
            self._sender.offer(manifest.upload)

    def _finish(self, learner: Learning, held: Holding) -> None:
        """Keep the result, report, compare if asked, and end or wait for another job."""
        assert held.adapter is not None and self._plans is not None
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
            predicted_mib=self._plans.now.predicted_mib,
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
        return self._plans.rank if self._plans is not None else 0

    def _say(self, state: str, *, detail: str = "") -> None:
        """Publish this device's status, and tell whoever watches."""
        assert self._standing is not None, "connected first"
        version = self._adapters.held.version if self._adapters else None
        self._standing.announce(
            self._connection, state, rank=self._rank, version=version, detail=detail
        )
        self._events.emit("state", state=state, **({"detail": detail} if detail else {}))

    def _bytes(self) -> None:
        self._events.emit(
            "bytes", up=self._connection.bytes_sent, down=self._connection.bytes_received
        )
