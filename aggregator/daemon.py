"""The aggregator at work: start up, serve until the job is done or somebody says stop, shut down.

One thread: a message is received, dealt with, committed, answered, acknowledged; between messages
the state machine of aggregator.rounds is asked what is due.
"""

from __future__ import annotations

import time
from dataclasses import replace

from aggregator.enrol.folder import Membership
from aggregator.errors import StoreError
from aggregator.intake import Intake, read_update
from aggregator.merge import Merged, RoundView, merge
from aggregator.publish import Publisher
from aggregator.rounds import Policy, RoundState, next_action
from aggregator.store import Store
from aggregator.versions import Versions, first_version
from protocol import topics
from protocol.errors import ProtocolError, TransportError
from protocol.events import EventLog
from protocol.faults import fault_point
from protocol.messages import Job
from protocol.signals import stop_on_signals
from protocol.signing import SigningKey, open_message
from protocol.transport import BrokerAddress, MqttTransport

TICK_S = 0.2
SCOUT_S = 0.5
"""How long the broker may take to show a job that it has."""


class Daemon:
    """Run one job."""

    def __init__(
        self,
        job: Job,
        policy: Policy,
        store: Store,
        broker: BrokerAddress,
        events: EventLog,
        *,
        membership: Membership | None = None,
        exit_when_done: bool = False,
    ) -> None:
        self._job = job
        self._policy = policy
        self._store = store
        self._events = events
        self._exit_when_done = exit_when_done
        self._stopping = False
        self._said_on = 0
        """The connection on which the job was last published whole."""
        self._key = (
            membership.key
            if membership
            else SigningKey.load_or_create(store.folder / "aggregator.key")
        )
        self._registry = membership.registry if membership else None
        tls = membership.tls if membership else None
        self._certified = tls is not None and broker.tls
        self._link = MqttTransport(broker, f"tunefleet-aggregator-{job.job}", tls=tls)
        self._versions = Versions(job, store)
        self._intake = Intake(
            job, store, self._versions, self._key, events, policy=policy, registry=self._registry
        )
        self._publisher = Publisher(job, store, self._key, self._link)

    def run(self) -> None:
        """Serve; returns after SIGTERM, SIGINT, or the end of the job if so asked.

        Raises:
            TransportError: the broker can't be reached, or the connection has ended for good.
        """
        with stop_on_signals(self._stop):
            try:
                self._start()
                while not self._stopping:
                    self._serve_one()
                    self._step()
            except TransportError:
                # Asked to stop while the broker is away: what is unsaid is said at the next start.
                if not self._stopping:
                    raise
            finally:
                self._link.close()

    # -- start up --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._store.bind_job(self._job.model_dump_json())
        if self._store.version(1) is None:
            first = self._versions.write(first_version(self._job), version=1, parent=None)
            fault_point("aggregator.start.written")
            self._store.add_version(first)
            self._store.set_round(RoundState(0, "waiting", 1, None))
        fault_point("aggregator.start.committed")
        self._check_alone()
        self._link.connect()
        job = self._job.job
        # The filter of upload chunks matches upload manifests too; both would bring them twice.
        self._link.subscribe(
            [topics.subscription(kind, job=job) for kind in ("status", "upload_chunk")]
        )
        fault_point("aggregator.start.connected")
        self._say_everything()
        fault_point("aggregator.start.said")
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

    def _check_alone(self) -> None:
        """Refuse a job that the broker has from somebody else: devices would hear only that one.

        A fleet's broker takes jobs from the fleet's aggregator alone, which has one key for all.
        It would also give a scout the aggregator's own session, by the name in the certificate.

        Raises:
            StoreError: its key is another than that of this state.
        """
        if self._certified:
            return
        topic = topics.topic("job", job=self._job.job)
        scout = MqttTransport(
            self._link.address, f"tunefleet-aggregator-{self._job.job}-scout", temporary=True
        )
        scout.connect()
        try:
            scout.subscribe([topic])
            known = scout.receive(SCOUT_S)
        finally:
            scout.close()
        if known is None or not known.payload:
            return
        try:
            _, key = open_message(known.payload, topic, Job)
        except ProtocolError:
            return
        if key != self._key.public:
            raise StoreError(
                f"the broker has a job {self._job.job!r} from another aggregator, or from this one "
                "with another --state: go on with that state, or take another job name"
            )

    def _say_everything(self) -> None:
        """Publish where the job stands, which a broker that was restarted may have forgotten."""
        self._said_on = self._link.connection
        state = self._store.round()
        manifest = self._store.version(state.version)
        assert manifest is not None, "a round's version is committed before the round is"
        self._publisher.version(manifest)
        self._publisher.job()
        self._publisher.round(state, self._policy.fraction)

    # -- serve -----------------------------------------------------------------------------------

    def _serve_one(self) -> None:
        if self._link.connected and self._link.connection != self._said_on:
            self._events.emit("reconnected", connection=self._link.connection)
            self._say_everything()
        incoming = self._link.receive(TICK_S)
        if incoming is None:
            return
        answers = self._intake.handle(incoming.topic, incoming.payload)
        fault_point("aggregator.message.handled")
        self._link.ack(incoming)
        fault_point("aggregator.message.acked")
        for topic, payload in answers:
            delivery = self._link.publish(topic, payload)
            if delivery.refused:
                self._events.emit("undelivered", topic=topic, reason=delivery.refused)
            fault_point("aggregator.message.answered")

    def _step(self) -> None:
        state = self._store.round()
        action = next_action(
            state,
            self._policy,
            job=self._job.job,
            rounds=self._job.rounds,
            time_s=time.time(),
            online=self._ready(),
            delivered={m.device for m in self._store.uploads_of(state.number, "counted")},
            refused={m.device for m in self._store.uploads_of(state.number, "rejected")},
        )
        if action == "open":
            self._enter(RoundState(state.number + 1, "open", state.version, self._deadline()))
        elif action == "merge":
            self._merge(state)
        elif action == "extend":
            self._enter(replace(state, deadline=self._deadline()))
        elif action == "finish":
            self._enter(RoundState(state.number, "finished", state.version, None))

    def _ready(self) -> set[str]:
        """Return the devices that may take part: no round waits for one that is kept out."""
        found = self._store.ready_devices() - self._store.quarantined(time.time())
        if self._registry is not None:
            found &= self._registry.devices()
        return found

    def _merge(self, state: RoundState) -> None:
        """Merge the round, publish its version, and go on to the next round."""
        fault_point("aggregator.merge.before")
        started = time.monotonic()
        merged = merge_round(self._job, self._store, self._versions, state)
        seconds = time.monotonic() - started
        fault_point("aggregator.merge.after")
        manifest = self._versions.write(
            merged.adapter, version=state.version + 1, parent=state.version
        )
        fault_point("aggregator.version.written")
        last = state.number >= self._job.rounds
        after = RoundState(
            state.number if last else state.number + 1,
            "finished" if last else "open",
            manifest.version,
            None if last else self._deadline(),
        )
        self._store.finish_round(
            after,
            manifest,
            number=state.number,
            seconds=seconds,
            weights=merged.weights,
            residual=merged.residual,
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
        self._announce(after)

    def _enter(self, state: RoundState) -> None:
        self._store.set_round(state)
        fault_point("aggregator.round.entered")
        self._announce(state)

    def _announce(self, state: RoundState) -> None:
        self._publisher.round(state, self._policy.fraction)
        fault_point("aggregator.round.announced")
        self._events.emit(
            "round",
            round=state.number,
            rounds=self._job.rounds,
            state=state.state,
            version=state.version,
        )
        if state.state == "finished" and self._exit_when_done:
            self._stopping = True

    def _stop(self) -> None:
        self._stopping = True
        self._link.abandon()

    def _deadline(self) -> float:
        return time.time() + self._policy.deadline_s


def merge_round(job: Job, store: Store, versions: Versions, state: RoundState) -> Merged:
    """Merge the counted updates of a round by the job's rule."""
    updates = [
        read_update(job, versions, manifest, store.update_file(manifest).read_bytes())
        for manifest in store.uploads_of(state.number, "counted")
    ]
    view = RoundView(
        versions.load(state.version),
        updates,
        job.base.modules,
        job.rank,
        seed=job.seed + state.number,
    )
    return merge(job.rule, view, settings=job.rule_settings)
