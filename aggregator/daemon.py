"""A job as it is served: start up, take in what has come, do what is due.

One thread: what has come is taken in (aggregator.batch), then what an operator asked for is done,
and the state machine of aggregator.rounds is asked what is due. The loop around one job, or
several, is aggregator.service's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aggregator.alone import check_alone
from aggregator.artifacts import ArtifactPublisher
from aggregator.batch import take_in, with_those_behind
from aggregator.engine import IN_PROCESS, Engine
from aggregator.enrol.folder import Membership
from aggregator.errors import MergeError
from aggregator.idle_settings import idle_settings
from aggregator.intake import Intake
from aggregator.link import Link, own_link
from aggregator.merging import commit_round
from aggregator.operating import Done, Operator
from aggregator.publish import Publisher
from aggregator.retention import tidy
from aggregator.rounds import Action, Policy, RoundState, next_action
from aggregator.shared_intake import upload_filters
from aggregator.steering import moved
from aggregator.store import Store
from aggregator.sweeper import Sweeper
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.events import EventLog
from protocol.faults import fault_point
from protocol.messages import Job
from protocol.patience import Waiting, connect_when_up
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, Incoming

TICK_S = 0.2


class Daemon:
    """Serve one job; `onnx` is the folder of an artifact set for devices, `engine` merges.

    It has a link of its own, or one that it is given, in which several jobs have a part each.
    `shared` has other processes take uploads in beside this one (aggregator.shared_intake).
    """

    def __init__(
        self,
        job: Job,
        policy: Policy,
        store: Store,
        broker: BrokerAddress | Link,
        events: EventLog,
        *,
        key: SigningKey,
        membership: Membership | None = None,
        onnx: Path | None = None,
        engine: Engine = IN_PROCESS,
        shared: bool = False,
        exit_when_done: bool = False,
        wait_for_broker: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare to serve; `clock` tells the time in seconds since 1970, a replay's another."""
        self._clock = clock
        self.taken_in = 0
        """Messages of devices that have been dealt with: committed, and answered."""
        self._job = job
        self._store = store
        self._steering = store.steering()
        self._policy = self._steering.in_force(policy)
        self._events = events
        self._engine = engine
        self._exit_when_done = exit_when_done
        self._wait_for_broker = wait_for_broker
        self._waiting = Waiting(events)
        self._stopping = False
        self._said_on = 0
        """The connection on which the job was last published whole."""
        self._key = key
        self._registry = membership.registry if membership else None
        tls = membership.tls if membership else None
        self._link: Link = (
            own_link(broker, job.job, tls, self._waiting)
            if isinstance(broker, BrokerAddress)
            else broker
        )
        self._certified = tls is not None and self._link.address.tls
        self._versions = Versions(job, store)
        self._shared = shared
        self._intake = Intake(
            job,
            store,
            self._versions,
            self._key,
            events,
            policy=self._policy,
            registry=self._registry,
            sharing=shared,
            clock=clock,
        )
        self._operator = Operator(job, policy, store, self._versions, events, clock)
        self._sweeper: Sweeper | None = None
        if membership is not None and self._certified:
            self._sweeper = Sweeper(
                job.job, membership.jobs, membership.registry, self._intake, self._link, events
            )
        self._publisher = Publisher(job, store, self._key, self._link, self.take_in_next)
        self._artifacts = ArtifactPublisher(
            job, onnx, store.folder, self._key, self._link, events, self.take_in_next
        )

    @property
    def job(self) -> str:
        return self._job.job

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop, or its job is done and it is to end then."""
        return self._stopping

    def stop(self) -> None:
        """Let nobody wait for anything any longer; it may be called from a signal handler."""
        self._stopping = True

    def close(self) -> None:
        """Leave the broker, which keeps the job."""
        self._link.close()

    # -- start up --------------------------------------------------------------------------------

    def start(self) -> None:
        """Check that the job can be served, and only then make the state folder this job's."""
        job = self._job.job
        self.check()
        if not self._connect(self._link):
            return
        if self._sweeper is not None:
            self._sweeper.subscribe()
        else:
            uploads, unused = upload_filters(job, shared=self._shared)
            self._link.unsubscribe([unused])  # of an earlier start: the session is kept
            self._link.subscribe([topics.subscription("status", job=job), uploads])
        fault_point("aggregator.start.connected")
        self._store.bind_job(self._job)
        self._store.set_policy(self._operator.policy)
        if self._store.round().version == 0:
            first = self._versions.write(first_version(self._job), version=1, parent=None)
            fault_point("aggregator.start.written")
            self._store.add_version(first)
            self._store.set_round(RoundState(0, "waiting", 1, None))
        fault_point("aggregator.start.committed")
        self._say_everything()
        fault_point("aggregator.start.said")
        tidy(self._store, self._policy.keep_versions)
        state = self._store.round()
        self._events.emit(
            "serving",
            job=job,
            broker=str(self._link.address),
            **self._job.model_dump(
                include={"rule", "rounds", "ladder", "remainder", "directions", "training"}
            ),
            round=state.number,
            state=state.state,
            version=state.version,
        )
        for idle in idle_settings(self._job, self._policy):
            self._events.emit("idle-setting", reason=idle)
        self._end_if_done(state)

    def check(self) -> None:
        """Check that the state is this job's, and that nobody else serves it.

        Raises:
            StoreError: it is not, or somebody does.
            TransportError: the broker can't be reached.
        """
        self._store.check_job(self._job)
        if not self._certified:
            # A fleet's broker takes jobs from the fleet's aggregator alone, which has one key for
            # all. It would also give a scout the aggregator's own session, by its certificate.
            check_alone(
                self._link.address,
                self._job.job,
                self._key.public,
                self._store.round(),
                self._connect,
            )

    def _connect(self, link: Link) -> bool:
        """Connect, once the broker is up; return False when stopped before."""
        return connect_when_up(
            link, self._waiting, stopping=lambda: self._stopping, wait=self._wait_for_broker
        )

    def _say_everything(self) -> None:
        """Publish where the job stands, which a broker that was restarted may have forgotten."""
        self._said_on = self._link.connection
        state = self._store.round()
        manifest = self._store.version(state.version)
        assert manifest is not None, "a round's version is committed before the round is"
        self._publisher.version(manifest, again=True)
        self._publisher.job()
        self._publisher.round(state, self._policy)
        self._artifacts.connected()

    # -- serve -----------------------------------------------------------------------------------

    def serve(self, wait_s: float = TICK_S) -> None:
        """Take in what has come, waiting a moment for it."""
        if self._link.connected and self._link.connection != self._said_on:
            self._events.emit("reconnected", connection=self._link.connection)
            self._say_everything()
        if (first := self._link.receive(wait_s)) is not None:
            self._take_in(first)
        self._artifacts.step()
        if self._sweeper is not None:
            self._sweeper.look_again()
        for delivery in self._link.refused():
            if self._sweeper is not None and self._sweeper.refused(delivery):
                continue
            self._events.emit("undelivered", topic=delivery.topic, reason=delivery.refused)

    def _take_in(self, first: Incoming) -> None:
        """Deal with a message and those behind it: all committed at once, then acknowledged."""
        self.taken_in += take_in(
            with_those_behind(first, self._link),
            self._deal_with,
            self._answer,
            store=self._store,
            link=self._link,
            intake=self._intake,
            events=self._events,
        )

    @property
    def standing(self) -> str:
        """Where the job stands, in a few words."""
        now = self._store.round()
        state = now.state if self._steering.paused is None else "paused"
        return f"{self.job}: round {now.number} of {self._job.rounds}, {state}"

    def _answer(self, topic: str, payload: bytes) -> None:
        self._link.post(topic, payload)

    def _deal_with(self, incoming: Incoming) -> list[tuple[str, bytes]]:
        if self._artifacts.takes(incoming):
            return []
        if self._sweeper is not None and self._sweeper.takes(incoming):
            return []
        return self._intake.handle(incoming.topic, incoming.payload)

    def take_in_next(self) -> None:
        """Take in what comes while something else is being said."""
        if (incoming := self._link.receive(0)) is not None:
            self._take_in(incoming)

    def step(self) -> Action | None:
        """Do what an operator asked for; ask what is due now, do it, and return what it was."""
        for done in self._operator.step():
            self._steer(done)
        if self._steering.paused is not None:
            return None
        state = self._store.round()
        answers = self._store.uploads.answered(state.number, state.attempt)
        action = next_action(
            state,
            self._policy,
            job=self._job.job,
            rounds=self._job.rounds,
            time_s=self._clock(),
            online=self._ready(),
            delivered=answers.delivered(self._policy),
            refused=answers.refused,
            buffered=len(answers.updates),
        )
        if action == "open":
            self._enter(RoundState(state.number + 1, "open", state.version, self._deadline()))
        elif action == "merge":
            self._merge(state)
        elif action == "extend":
            self._enter(replace(state, attempt=state.attempt + 1, deadline=self._deadline()))
        elif action == "finish":
            self._enter(replace(state, state="finished", deadline=None))
        return action

    def hold(self, why: MergeError) -> None:
        """Pause the job, whose round can't be merged as things stand: the other jobs go on."""
        self._store.set_steering(replace(self._steering, paused=self._clock()))
        told = f"{why}; the job is paused: `aggregator job resume {self.job}` tries again"
        self._events.emit("held", round=self._store.round().number, reason=told)
        self._steer()

    def reload(self, policy: Policy) -> None:
        """Go by what the job file says of rounds now; what a command has changed stays changed."""
        kept, now = self._store.steering(), self._store.round()
        before = kept.policy(self._operator.policy)
        after = moved(now, before, kept.policy(policy))
        with self._store.transaction():
            self._store.set_policy(policy)
            self._store.set_round(after)
        self._operator.policy = policy
        self._steer()

    def _steer(self, done: Done | None = None) -> None:
        """Go by what was changed, and tell everybody."""
        self._steering = self._store.steering()
        self._policy = self._intake.policy = self._steering.in_force(self._operator.policy)
        version = done.version if done is not None else None
        if version is not None:
            self._publisher.version(version)
        self._announce(self._store.round())
        if version is not None:
            tidy(self._store, self._policy.keep_versions)

    def _ready(self) -> set[str]:
        """Return the devices that may take part: no round waits for one that is kept out."""
        found = self._store.devices.ready()
        if kept_out := self._store.devices.quarantined(self._clock()):
            found = found - kept_out
        return found if self._registry is None else found & self._registry.devices()

    def _merge(self, state: RoundState) -> None:
        """Merge the round, publish its version, and go on to the next round."""
        fault_point("aggregator.merge.before")
        done = commit_round(
            self._job,
            self._store,
            self._versions,
            state,
            self._policy,
            deadline=self._deadline,
            engine=self._engine,
        )
        fault_point("aggregator.round.committed")
        merged = done.outcome.merged
        self._publisher.version(done.manifest)
        fault_point("aggregator.version.published")
        self._events.emit(
            "merged",
            round=state.number,
            rounds=self._job.rounds,
            version=done.manifest.version,
            seconds=round(done.seconds, 3),
            devices=len(merged.weights),
            weights=merged.weights,
            residual=merged.residual,
        )
        for warning in merged.warnings:
            self._events.emit("warning", round=state.number, reason=warning)
        for event, fields in done.outcome.told().items():
            self._events.emit(event, round=state.number, **fields)
        self._announce(done.after)
        tidy(self._store, self._policy.keep_versions)

    def _enter(self, state: RoundState) -> None:
        self._store.set_round(state)
        fault_point("aggregator.round.entered")
        self._announce(state)

    def _announce(self, state: RoundState) -> None:
        self._publisher.round(state, self._policy)
        fault_point("aggregator.round.announced")
        self._events.emit(
            "round",
            round=state.number,
            attempt=state.attempt,
            fraction=self._policy.share(state.attempt),
            rounds=self._job.rounds,
            state=state.state,
            version=state.version,
        )
        self._end_if_done(state)

    def _end_if_done(self, state: RoundState) -> None:
        if state.state == "finished" and self._exit_when_done:
            self._stopping = True

    def _deadline(self) -> float:
        return self._clock() + self._policy.deadline_s
