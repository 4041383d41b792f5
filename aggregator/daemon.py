"""The aggregator at work: start up, serve until the job is done or somebody says stop, shut down.

One thread: what has come is dealt with, committed, acknowledged, answered; then the state machine
of aggregator.rounds is asked what is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aggregator.alone import check_alone
from aggregator.artifacts import ArtifactPublisher
from aggregator.enrol.folder import Membership
from aggregator.intake import Intake
from aggregator.memory import read_memory, write_memory
from aggregator.merge import RoundView, merge
from aggregator.merge.round_view import completed
from aggregator.outcome import Outcome
from aggregator.personal import strategy_of
from aggregator.personal.serving import merge_personal
from aggregator.publish import Publisher
from aggregator.retention import tidy
from aggregator.rounds import Action, Policy, RoundState, next_action
from aggregator.store import Store
from aggregator.sweeper import Sweeper
from aggregator.updates import stored_update
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.errors import TransportError
from protocol.events import EventLog
from protocol.factors import trained_factors
from protocol.faults import fault_point
from protocol.messages import Job
from protocol.patience import Waiting, connect_when_up
from protocol.signals import stop_on_signals
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, Incoming, MqttTransport

TICK_S = 0.2
BATCH = 32
"""Messages that are committed together."""


class Daemon:
    """Run one job; `onnx` is the folder of an artifact set for devices to fetch."""

    def __init__(
        self,
        job: Job,
        policy: Policy,
        store: Store,
        broker: BrokerAddress,
        events: EventLog,
        *,
        key: SigningKey,
        membership: Membership | None = None,
        onnx: Path | None = None,
        exit_when_done: bool = False,
        wait_for_broker: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare to serve; `clock` tells the time in seconds since 1970, a replay's another."""
        self._clock = clock
        self.taken_in = 0
        """Messages of devices that have been dealt with: committed, and answered."""
        self._job = job
        self._policy = policy
        self._store = store
        self._events = events
        self._exit_when_done = exit_when_done
        self._wait_for_broker = wait_for_broker
        self._waiting = Waiting(events)
        self._stopping = False
        self._said_on = 0
        """The connection on which the job was last published whole."""
        self._key = key
        self._registry = membership.registry if membership else None
        tls = membership.tls if membership else None
        self._certified = tls is not None and broker.tls
        self._link = MqttTransport(
            broker,
            f"tunefleet-aggregator-{job.job}",
            tls=tls,
            on_outage=lambda why: self._waiting.say(f"the broker at {broker}", why),
        )
        self._versions = Versions(job, store)
        self._intake = Intake(
            job,
            store,
            self._versions,
            self._key,
            events,
            policy=policy,
            registry=self._registry,
            clock=clock,
        )
        self._sweeper: Sweeper | None = None
        if membership is not None and self._certified:
            self._sweeper = Sweeper(
                job.job, membership.jobs, membership.registry, self._intake, self._link, events
            )
        self._publisher = Publisher(job, store, self._key, self._link, self._take_in_next)
        self._artifacts = ArtifactPublisher(
            job, onnx, store.folder, self._key, self._link, events, self._take_in_next
        )

    def run(self) -> None:
        """Serve; returns after SIGTERM, SIGINT, or the end of the job if so asked.

        Raises:
            TransportError: the broker can't be reached, or the connection has ended for good.
        """
        with stop_on_signals(self._stop):
            try:
                self.start()
                while not self._stopping:
                    self.serve()
                    self.step()
            except TransportError:
                # Asked to stop while the broker is away: what is unsaid is said at the next start.
                if not self._stopping:
                    raise
            finally:
                self.close()

    def close(self) -> None:
        """Leave the broker, which keeps the job."""
        self._link.close()

    # -- start up --------------------------------------------------------------------------------

    def start(self) -> None:
        """Check that the job can be served, and only then make the state folder this job's."""
        job, settings = self._job.job, self._job.model_dump_json()
        self._store.check_job(settings)
        if not self._certified:
            # A fleet's broker takes jobs from the fleet's aggregator alone, which has one key for
            # all. It would also give a scout the aggregator's own session, by its certificate.
            check_alone(
                self._link.address, job, self._key.public, self._store.round(), self._connect
            )
        if not self._connect(self._link):
            return
        if self._sweeper is not None:
            self._sweeper.subscribe()
        else:
            # The filter of upload chunks matches upload manifests too; both would bring them twice.
            self._link.subscribe(
                [topics.subscription(kind, job=job) for kind in ("status", "upload_chunk")]
            )
        fault_point("aggregator.start.connected")
        self._store.bind_job(settings)
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
        self._end_if_done(state)

    def _connect(self, link: MqttTransport) -> bool:
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
        self._publisher.round(state, self._policy.share(state.attempt))
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
        batch, answers = [first], []
        with self._events.held(), self._store.transaction():
            answers += self._deal_with(first)
            while len(batch) < BATCH and (incoming := self._link.receive(0)) is not None:
                answers += self._deal_with(incoming)
                batch.append(incoming)
            fault_point("aggregator.messages.handled")
        fault_point("aggregator.messages.committed")
        for incoming in batch:
            self._link.ack(incoming)
        fault_point("aggregator.messages.acked")
        for topic, payload in answers:
            self._answer(topic, payload)
            fault_point("aggregator.message.answered")
        self.taken_in += len(batch)

    def _answer(self, topic: str, payload: bytes) -> None:
        self._link.post(topic, payload)

    def _deal_with(self, incoming: Incoming) -> list[tuple[str, bytes]]:
        if self._artifacts.takes(incoming):
            return []
        if self._sweeper is not None and self._sweeper.takes(incoming):
            return []
        return self._intake.handle(incoming.topic, incoming.payload)

    def _take_in_next(self) -> None:
        """Take in what comes while something else is being said."""
        if (incoming := self._link.receive(0)) is not None:
            self._take_in(incoming)

    def step(self) -> Action | None:
        """Ask what is due now, do it, and return what it was."""
        state = self._store.round()
        delivered, refused = self._store.uploads.answered(state.number, state.attempt)
        action = next_action(
            state,
            self._policy,
            job=self._job.job,
            rounds=self._job.rounds,
            time_s=self._clock(),
            online=self._ready(),
            delivered=delivered,
            refused=refused,
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

    def _ready(self) -> set[str]:
        """Return the devices that may take part: no round waits for one that is kept out."""
        found = self._store.devices.ready()
        if kept_out := self._store.devices.quarantined(self._clock()):
            found = found - kept_out
        return found if self._registry is None else found & self._registry.devices()

    def _merge(self, state: RoundState) -> None:
        """Merge the round, publish its version, and go on to the next round."""
        fault_point("aggregator.merge.before")
        started = time.monotonic()
        outcome = merge_round(self._job, self._store, self._versions, state)
        merged = outcome.merged
        seconds = time.monotonic() - started
        fault_point("aggregator.merge.after")
        manifest = self._versions.write(
            merged.adapter, version=state.version + 1, parent=state.version
        )
        manifest = outcome.write(manifest)
        fault_point("aggregator.version.written")
        carried = write_memory(self._store, merged.memory, version=manifest.version)
        fault_point("aggregator.memory.written")
        if state.number >= self._job.rounds:
            after = replace(state, state="finished", version=manifest.version, deadline=None)
        else:
            after = RoundState(state.number + 1, "open", manifest.version, self._deadline())
        self._store.finish_round(
            after,
            manifest,
            number=state.number,
            seconds=seconds,
            weights=merged.weights,
            residual=merged.residual,
            carried=carried,
            late_updates=self._policy.late_updates,
            beside=outcome.commit,
        )
        fault_point("aggregator.round.committed")
        self._publisher.version(manifest)
        fault_point("aggregator.version.published")
        self._events.emit(
            "merged",
            round=state.number,
            rounds=self._job.rounds,
            version=manifest.version,
            seconds=round(seconds, 3),
            devices=len(merged.weights),
            weights=merged.weights,
            residual=merged.residual,
        )
        for warning in merged.warnings:
            self._events.emit("warning", round=state.number, reason=warning)
        for event, fields in outcome.told().items():
            self._events.emit(event, round=state.number, **fields)
        self._announce(after)
        tidy(self._store, self._policy.keep_versions)

    def _enter(self, state: RoundState) -> None:
        self._store.set_round(state)
        fault_point("aggregator.round.entered")
        self._announce(state)

    def _announce(self, state: RoundState) -> None:
        share = self._policy.share(state.attempt)
        self._publisher.round(state, share)
        fault_point("aggregator.round.announced")
        self._events.emit(
            "round",
            round=state.number,
            attempt=state.attempt,
            fraction=share,
            rounds=self._job.rounds,
            state=state.state,
            version=state.version,
        )
        self._end_if_done(state)

    def _end_if_done(self, state: RoundState) -> None:
        if state.state == "finished" and self._exit_when_done:
            self._stopping = True

    def _stop(self) -> None:
        self._stopping = True
        self._link.abandon()

    def _deadline(self) -> float:
        return self._clock() + self._policy.deadline_s


def merge_round(job: Job, store: Store, versions: Versions, state: RoundState) -> Outcome:
    """Merge the counted updates of a round by the job's rule, which reads them module by module."""
    if (strategy := strategy_of(job.rule)) is not None:
        return merge_personal(job, strategy, store, versions, state)
    updates = []
    trained = trained_factors(job.training.factors, state.number)
    for manifest in store.uploads.of_round(state.number, "counted"):
        update = stored_update(job, versions, manifest, store.uploads.file(manifest))
        if behind := state.number - manifest.round:
            update = completed(update, versions.load(manifest.version))
            update = replace(update, staleness=behind)
            trained = "both"  # it has other rows than the previous global of what it left frozen
        updates.append(update)
    view = RoundView(
        versions.load(state.version),
        updates,
        job.base.modules,
        job.rank,
        seed=job.seed + state.number,
        memory=read_memory(store),
        trained=trained,
    )
    return Outcome(merge(job.rule, view, settings=job.rule_settings))
