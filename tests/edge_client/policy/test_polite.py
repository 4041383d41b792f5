"""What an agent asks of its owner's policy: between steps, while it waits, when it is to end."""

from __future__ import annotations

import json
from datetime import datetime
from io import StringIO
from pathlib import Path

import pytest

from device_profiles.schema import load_profile
from edge_client.config import Settings
from edge_client.outbox import Outbox
from edge_client.policy import polite as asking
from edge_client.policy.decide import Reason
from edge_client.policy.owner import Policy
from edge_client.policy.polite import Polite
from protocol.events import EventLog
from protocol.transport import BrokerAddress

NOON = datetime(2026, 3, 2, 12, 0)


class Owner:
    """A device's owner, who changes things while it is at work."""

    def __init__(self, folder: Path, policy: Policy) -> None:
        self.now, self.stopping = NOON, False
        self.said = StringIO()
        self.more: Reason | None = None
        settings = Settings(
            name="phone", broker=BrokerAddress("127.0.0.1", 1), data=(), state=folder,
            cache=folder, profile=load_profile("laptop-16gb"), policy=policy, system_root=folder,
        )  # fmt: skip
        self.outbox = Outbox(folder)
        self.polite = Polite(
            settings,
            self.outbox,
            lambda: self.stopping,
            EventLog(as_json=True, stream=self.said),
            now=lambda: self.now,
            also=[lambda: self.more],
        )


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Owner:
    monkeypatch.setattr(asking, "LOOK_S", 0.0)
    return Owner(tmp_path, Policy(hours=["08:00-13:00"], mib_a_day=1, minutes_a_day=60))


def test_a_step_is_the_last_once_its_time_is_over(owner: Owner) -> None:
    polite = owner.polite
    with polite.steps():
        assert not polite.pause_after_step()
        owner.now = NOON.replace(hour=13)
        assert polite.pause_after_step()
    assert [reason.kind for reason in polite.against("train")] == ["hours"]
    assert polite.against("transfer") == ()
    assert polite.usage.today().training_s > 0


def test_a_day_that_is_used_up(owner: Owner) -> None:
    polite = owner.polite
    polite.usage.note_bytes(2**20)
    polite.usage.note_training(3600.0)
    assert [r.kind for r in polite.against("transfer")] == ["bytes"]
    assert [r.kind for r in polite.against("train")] == ["minutes"]
    owner.now = NOON.replace(day=3)
    assert polite.against("transfer") == polite.against("train") == ()


def test_another_reason_to_pause_gives_memory_back(owner: Owner) -> None:
    polite = owner.polite
    owner.more = Reason("pressure", "memory runs short; until some is free", wants_memory=True)
    reasons = polite.against("train")
    assert reasons == (owner.more,) and polite.against("transfer") == ()
    assert polite.wants_memory(reasons)
    with polite.steps():
        assert polite.pause_after_step()


def test_a_long_wait_gives_memory_back(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    owner.now = NOON.replace(hour=14)
    reasons = owner.polite.against("train")
    assert reasons and not owner.polite.wants_memory(reasons)
    assert owner.polite.against("transfer") == (), "which goes on, and ends no wait to train"
    monkeypatch.setattr(asking, "RELEASE_S", -1.0)
    assert owner.polite.wants_memory(reasons)
    owner.now = NOON
    assert not owner.polite.wants_memory(owner.polite.against("train"))


def test_what_cannot_be_kept_is_an_event(owner: Owner) -> None:
    owner.polite.note_unkept("No space left on device")
    event = json.loads(owner.said.getvalue())
    assert (event["event"], event["why"]) == ("unkept", "No space left on device")


def test_what_is_news(owner: Owner) -> None:
    polite = owner.polite
    low, lower = (Reason("battery", f"{percent} %") for percent in (30, 29))
    assert not polite.is_news(())
    assert polite.is_news([low])
    assert not polite.is_news([lower]), "not at each percent"
    assert polite.is_news([lower, Reason("heat", "80 °C")])
    assert polite.is_news(())


def test_who_is_told_to_end_pauses_after_the_step(owner: Owner) -> None:
    owner.now = NOON.replace(hour=9)
    with owner.polite.steps():
        assert not owner.polite.pause_after_step()
        owner.stopping = True
        assert owner.polite.pause_after_step()
