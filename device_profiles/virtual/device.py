"""One virtual device: the agent's code (`Participant`), driven by events of virtual time."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.errors import EngineError
from device_profiles.schema import Power
from device_profiles.traces.format import Trace
from device_profiles.traces.sample import Sample
from device_profiles.virtual.equipment import MakeLearner, VirtualEquipment
from device_profiles.virtual.learning import Timed
from device_profiles.virtual.link import Rates, VirtualLink
from device_profiles.virtual.schedule import Schedule
from edge_client.config import Settings
from edge_client.discover import listen
from edge_client.errors import TrainingPaused
from edge_client.outbox import Outbox
from edge_client.participant import Participant
from edge_client.plan import Calibration, Plan
from edge_client.policy.decide import DeviceState, Reason
from edge_client.policy.owner import Policy
from edge_client.policy.senses import Senses
from edge_client.pressure import Reading
from edge_client.standing import Standing
from protocol.adapter import Adapter
from protocol.errors import TunefleetError
from protocol.events import EventLog
from protocol.link import Incoming
from protocol.loop_link import Loop
from protocol.messages import Job
from protocol.signing import SigningKey

Fidelity = Literal["train", "recorded", "headless"]
QUIET_S = 0.5
"""The agent looks what is to be done when so long nothing has come, as on a device."""
LOOK_S = 30.0
"""Who trains looks at its device as often at least, and where the trace changes; who waits does so
no more often."""
SOONEST_S = 1.0
HEADLESS = Reason("headless", "a headless device of a replay: it takes part in the protocol alone")
UNKNOWN_BITS_S = 1e9
SHARED = 256
"""Adapters that are kept to be shared: those of old versions go, the oldest first."""
OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """What all virtual devices of a replay have in common."""

    loop: Loop
    schedule: Schedule
    job: Job
    calibration: Calibration | None
    """None: no device trains, not even in name."""
    epoch: datetime
    """The local time at which the replay starts."""
    on_event: OnEvent
    """Of the broker; see `VirtualLink`."""
    adapters: dict[Hashable, Adapter] = field(default_factory=dict)
    """What devices have held last, by where it is from and its bands."""


class VirtualDevice:
    """Be on line, train and transfer as a trace lets a device."""

    def __init__(
        self,
        stage: Stage,
        index: int,
        settings: Settings,
        trace: Trace,
        offset_s: float,
        fidelity: Fidelity,
        make_learner: MakeLearner,
    ) -> None:
        self.index, self.settings, self.fidelity = index, settings, fidelity
        self.time_s = 0.0
        """This device's own time: of the event that it is at."""
        self.is_over = self.is_online = self._is_closed = False
        self.has_finished = False
        """Whether its agent has kept the job's result."""
        self.fault = ""
        self._stage, self._trace, self._offset_s = stage, trace, offset_s
        self._equipment: VirtualEquipment | None = None
        self._make_learner = make_learner
        self._adapter: Adapter | None = None
        self._inbox: deque[Incoming] = deque()
        self._wake_s = -1.0
        """When it looks next what is to be done; below 0: it need not."""
        events = _Events(self._tell)
        outbox = Outbox(settings.state, in_memory=True)
        key = device_key(stage.job.seed, settings.name)
        self.participant = Participant(
            settings,
            events,
            outbox,
            key,
            equip=self._equip,
            senses=self._senses(),
            also=(lambda: HEADLESS,) if fidelity == "headless" else (),
        )
        boot = outbox.next_boot(self._since_1970())
        standing = Standing(settings, stage.job.job, boot, key)
        self.link = VirtualLink(
            stage.loop,
            settings.broker,
            f"tunefleet-{settings.name}",
            standing.will,
            schedule=stage.schedule,
            device=index,
            now=lambda: self.time_s,
            rates=self._rates,
            deliver=self._deliver,
        )
        self.participant.enter(stage.job.job, self.link, standing)
        listen(self.link, standing, stage.job.job, settings.name)
        self._look_at_link(0.0)

    def __str__(self) -> str:
        return f"{self.settings.name} ({self.link.lacks(self.participant.outstanding)})"

    # -- the trace -----------------------------------------------------------------------------

    @property
    def sample(self) -> Sample:
        """How the device is at its own time."""
        return self.sample_at(self.time_s)

    def sample_at(self, time_s: float) -> Sample:
        return self._trace.looped(self._offset_s + time_s)

    def next_change_s(self, time_s: float, field: str = "") -> float | None:
        """Return when the trace says something new, of one field or of any; None: never."""
        change = self._trace.looped_change(self._offset_s + time_s, field)
        return None if change is None else change - self._offset_s

    def _rates(self, time_s: float) -> Rates:
        sample, link = self.sample_at(time_s), self.settings.profile.link

        def bits_s(mbit: float | None, otherwise: float | None) -> float:
            known = otherwise if mbit is None else mbit
            return UNKNOWN_BITS_S if known is None else known * 1e6

        return Rates(
            bits_s(sample.down_mbit, link.down_mbit if link else None),
            bits_s(sample.up_mbit, link.up_mbit if link else None),
        )

    def _senses(self) -> Senses:
        def download_bytes() -> float:
            return self._rates(self.time_s).down / 8 * self.settings.download_s

        return Senses(
            now=self._local_time,
            clock=lambda: self.time_s,
            state=self._state,
            pressure=self._pressure,
            taken_mib=self._taken_mib,
            download_bytes=download_bytes,
            needs_mib=self._needs_mib,
            plans_anew=True,
        )

    # -- the agent's senses --------------------------------------------------------------------

    def _local_time(self) -> datetime:
        return self._stage.epoch + timedelta(seconds=self.time_s)

    def _since_1970(self) -> float:
        return (self._local_time() - datetime(1970, 1, 1)).total_seconds()

    def _state(self, policy: Policy) -> DeviceState:
        sample = self.sample
        return DeviceState(
            Power(source=sample.power, battery_percent=sample.battery_percent),
            sample.temperature_c,
            sample.cpu_load,
            sample.metered,
        )

    def _pressure(self, _: Path, at_s: float) -> Reading:
        available = self.sample.memory_available_mib
        left = None if available is None else max(0.0, available - self._taken_mib())
        return Reading(at_s, self.settings.profile.memory.total_mib, left)

    def _taken_mib(self) -> float:
        return self._equipment.taken_mib if self._equipment is not None else 0.0

    def _needs_mib(self, plan: Plan) -> float:
        assert self._equipment is not None, "which has made the plan"
        return self._equipment.needs_mib(plan)

    def trained(self, seconds: float) -> None:
        """Count time of training for the owner's limit of a day."""
        self.participant.polite.usage.note_training(seconds)

    def _equip(self, settings: Settings, job: Job) -> VirtualEquipment:
        assert self._stage.calibration is not None, "there is one where devices train"
        self._equipment = VirtualEquipment(
            settings, job, self, self._stage.calibration, self._make_learner
        )
        return self._equipment

    # -- events --------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Say whether nothing real is under way to or from this device."""
        if self.is_over or not self.is_online:
            return True
        return self.link.is_settled(self.participant.outstanding)

    @property
    def is_connecting(self) -> bool:
        """Say whether the broker has still to let it in."""
        return self.link.is_connecting

    def _look_at_link(self, time_s: float) -> None:
        """Connect or get out of reach as the trace says, and look again where it changes."""
        if self.is_over:
            return
        self._advance_to(time_s)
        online = self.sample.online
        if online and not self.is_online:
            self.is_online = True
            self.link.connect()
            self.wake_at(self.time_s + QUIET_S)
            self.tell("online")
        elif not online and self.is_online:
            self.is_online = False
            self.link.lose()
            self.tell("offline")
        change = self.next_change_s(self.time_s, "online")
        if change is not None:
            self._stage.schedule.at(change, self.index, self._look_at_link)

    def _deliver(self, incoming: Incoming, time_s: float) -> None:
        self._advance_to(time_s)
        if self.is_over:
            return
        self._inbox.append(incoming)
        if not self._trains:
            self._take_all()

    @property
    def _trains(self) -> bool:
        """Whether it is between two steps of a training: then an agent takes no message."""
        timed = self._timed
        return timed is not None and timed.runs

    @property
    def _timed(self) -> Timed | None:
        return self._equipment.timed if self._equipment is not None else None

    def _take_all(self) -> None:
        while self._inbox and not self.is_over:
            with self._ending():
                self.participant.take(self._inbox.popleft())
                self._share()
            self.wake_at(self.time_s + QUIET_S)

    def _share(self) -> None:
        """Hold one copy of an adapter with all who have been given the same bytes."""
        held = self.participant.held
        if held is not None and held.adapter is not None and held.adapter is not self._adapter:
            source = held.source
            assert source is not None, "it came from there"
            whose = "" if source.kind == "global" else source.device
            key = whose, source.kind, source.version, held.bands, held.adapter.rank
            shared = self._stage.adapters
            self._adapter = held.adapter = shared.setdefault(key, held.adapter)
            while len(shared) > SHARED:
                del shared[next(iter(shared))]

    def wake_at(self, time_s: float) -> None:
        """Look what is to be done at a time, and not before."""
        self._wake_s = time_s
        self._stage.schedule.at(time_s, self.index, self._wake)

    def _wake(self, time_s: float) -> None:
        if self.is_over or time_s < self._wake_s or self._wake_s < 0:
            return
        self._wake_s = -1.0
        self._advance_to(time_s)
        with self._ending():
            if (timed := self._timed) is not None and timed.runs:
                self._train_on(timed)
            elif self.is_online:
                self._advance()
        if not self._trains:
            self._take_all()
        self._plan_wake()

    def _train_on(self, timed: Timed) -> None:
        """Look after a training that is under way: it goes on, pauses, is killed, or is over."""
        timed.account()
        available = self.sample.memory_available_mib
        if available is not None and self._taken_mib() > available:
            self.tell("killed", available_mib=available, taken_mib=self._taken_mib())
            timed.kill(f"the trace has {available:.0f} MiB available")
        elif not self.participant.may("train"):
            timed.pause()
        elif timed.ends_s <= self.time_s:
            self._advance()
            if timed.ends_s <= self.time_s:  # something else came first: it is asked for again
                timed.pause()

    def _advance(self) -> None:
        with suppress(TrainingPaused):
            self.participant.advance()

    def _plan_wake(self) -> None:
        """Wake again where time alone may change what is to be done."""
        if self.is_over or self._wake_s >= 0:
            return
        timed = self._timed
        training = timed is not None and timed.is_under_way
        waiting = self.fidelity != "headless" and bool(self.participant.reasons)
        if not (training or waiting or self.participant.is_busy):
            return
        next_s = self.time_s + LOOK_S
        change = self.next_change_s(self.time_s)
        if timed is not None and timed.runs:
            # An agent asks between steps whether to go on.
            soon_s = next_s if change is None else max(change, self.time_s + SOONEST_S)
            next_s = min(next_s, soon_s, max(timed.ends_s, self.time_s))
        elif waiting and change is not None:
            next_s = max(next_s, change)
        self.wake_at(next_s)

    def _advance_to(self, time_s: float) -> None:
        self.time_s = max(self.time_s, time_s)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End this device's part where its agent can't go on, and say why."""
        try:
            yield
        except EngineError:  # it is no device's
            raise
        except TunefleetError as error:
            self.fault = str(error)
            self.tell("ended", why=str(error))
            self.participant.say_unfit(self.fault)
            self.is_over = True
            self._stage.schedule.at(self.link.idle_s, self.index, lambda _: self.close())

    # -- telling -------------------------------------------------------------------------------

    def tell(self, event: str, **fields: object) -> None:
        """Tell of something that the agent does not know."""
        self._tell({"event": event, **fields})

    def _tell(self, event: Mapping[str, Any]) -> None:
        at_s = round(self.time_s, 6)
        self.has_finished = self.has_finished or event["event"] == "finished"
        self._stage.on_event({**event, "time": at_s, "device": self.settings.name})

    def close(self) -> None:
        """Leave the broker, for good."""
        self.is_over, self.is_online = True, False
        if self._is_closed:
            return
        self._is_closed = True
        self.link.close()
        self.participant.close()


class _Events(EventLog):
    """Tell a device's events to the replay alone."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(as_json=True)
        self._tell = tell

    def emit(self, event: str, **fields: object) -> None:
        self._tell({"event": event, **fields})


def device_key(seed: int, name: str) -> SigningKey:
    """Return a device's key: of the seed, so that a run's messages are those of the next one."""
    digest = hashlib.sha256(f"{seed}|{name}|replayed device".encode()).digest()
    return SigningKey(Ed25519PrivateKey.from_private_bytes(digest))


def for_replay(policy: Policy) -> Policy:
    """Return a policy without what would change this process: priorities."""
    return policy.model_copy(update={"nice": None, "io": None})
