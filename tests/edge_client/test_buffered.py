"""A device whose training was paused while a buffered round moved on: the real agent and broker."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.publish import Publisher
from aggregator.rounds import Policy, RoundState
from aggregator.versions import Versions
from device_profiles.schema import load_profile
from edge_client.agent import Agent
from edge_client.config import Settings
from edge_client.errors import TrainingPaused
from edge_client.holding import goes_on_with
from edge_client.learner import Pauses, StepDown
from edge_client.learning import Learned, OnStep, Place
from edge_client.outbox import Outbox
from edge_client.plan import Plan
from edge_client.trainer import process
from protocol.adapter import Adapter
from protocol.events import EventLog
from protocol.messages import Job, Round
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import Aggregator, make_job
from tests.faults.device import Ledger, MadeUp, MarkingLearner

NAME = "phone-1"


@pytest.fixture(autouse=True)
def _others_may_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is told to stop ends all training of its process: here others follow."""
    monkeypatch.setattr(process, "_ending", False)


def test_it_goes_on_with_what_it_has_begun_while_that_counts() -> None:
    def newest(number: int, **more: object) -> Round:
        return Round.model_validate(
            {"job": "notes", "number": number, "state": "open", "version": number, **more}
        )

    begun = newest(3)
    assert goes_on_with(None, newest(4, behind=8)) == newest(4, behind=8)
    assert goes_on_with(begun, newest(5, behind=2)) is begun
    assert goes_on_with(begun, newest(6, behind=2)).number == 6
    assert goes_on_with(begun, newest(4)).number == 4, "a synchronous round that is over is over"
    assert goes_on_with(begun, newest(4, behind=2, state="finished")).number == 4
    assert goes_on_with(begun, newest(3, behind=2, attempt=1)).attempt == 1


class PausingLearner(MarkingLearner):
    """Pause the first training until the agent has heard of a newer round; then stop the agent."""

    fleet: PausedFleet

    def train(self, held: Adapter, rank: int, place: Place, on_step: OnStep) -> Learned:
        self.fleet.go_on()
        known = self.fleet.agent._round
        if known is None or known.number == 1:
            raise TrainingPaused(1)
        self.fleet.agent._stop()
        return super().train(held, rank, place, on_step)


class PausedFleet:
    """An aggregator that opens round 1, and round 2 once the device is at work; and the device."""

    def __init__(self, folder: Path, broker: BrokerAddress, policy: Policy) -> None:
        self._policy = policy
        self._aggregator = Aggregator(folder / "aggregator", make_job(ladder=[2, 4]))
        a = self._aggregator
        self._link = MqttTransport(broker, "tunefleet-aggregator-notes")
        self._link.connect()
        self._publisher = Publisher(a.job, a.store, a.key, self._link, lambda: None)
        first = a.store.version(1)
        assert first is not None
        self._publisher.version(first)
        self._publisher.job()
        self._publisher.round(RoundState(1, "open", 1, None), policy)
        self._gone_on = False
        settings = Settings(
            name=NAME,
            broker=broker,
            tls=None,
            data=(),
            state=folder / NAME,
            cache=folder / NAME,
            profile=load_profile("laptop-16gb"),
            job="notes",
        )
        self.log = io.StringIO()
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.agent = Agent(settings, EventLog(as_json=True, stream=self.log), equip=self._equip)

    def _equip(self, settings: Settings, job: Job) -> MadeUp:
        equipment = MadeUp(settings, job, self.ledger)

        def learner(plan: Plan, step_down: StepDown, pauses: Pauses) -> MarkingLearner:
            made = PausingLearner(job, settings.name, self.ledger)
            made.fleet = self
            return made

        equipment.learner = learner  # type: ignore[method-assign]
        return equipment

    def go_on(self) -> None:
        """Merge round 1, as far as the device can see."""
        if self._gone_on:
            return
        self._gone_on = True
        a = self._aggregator
        versions = Versions(a.job, a.store)
        second = versions.write(versions.load(1), version=2, parent=1)
        a.store.add_version(second)
        self._publisher.version(second)
        self._publisher.round(RoundState(2, "open", 2, None), self._policy)

    def close(self) -> None:
        self._link.close()
        self._aggregator.store.close()


@pytest.mark.parametrize(
    ("policy", "trained"), [(Policy(buffer=2, max_staleness=1), 1), (Policy(), 2)]
)
def test_a_paused_training_is_not_lost_where_it_still_counts(
    tmp_path: Path, mosquitto: BrokerAddress, policy: Policy, trained: int
) -> None:
    with closing(PausedFleet(tmp_path, mosquitto, policy)) as fleet:
        fleet.agent.run()
    assert '"paused"' in fleet.log.getvalue()
    with closing(Outbox(tmp_path / NAME)) as outbox:
        (upload,) = outbox.pending("notes")
        found = outbox.get(upload)
    assert found is not None
    assert (found.manifest.round, found.manifest.version) == (trained, trained)
