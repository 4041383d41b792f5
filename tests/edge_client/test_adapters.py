"""A device's adapters over a real broker: its own, broken ones to try, and ones that never come."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edge_client.adapters
from device_profiles.schema import load_profile
from edge_client.adapters import Adapters
from edge_client.config import Settings
from edge_client.download import Source
from edge_client.outbox import Outbox
from edge_client.plans import Reach
from edge_client.policy.owner import Policy
from protocol import topics
from protocol.adapter import Adapter, Factors, initial_adapter, parameter_count
from protocol.bands import bands, cut, to_tensors
from protocol.chunks import split
from protocol.events import EventLog
from protocol.messages import GlobalManifest, Round, describe_file
from protocol.signing import SigningKey
from protocol.tensors import bytes_each, encode
from protocol.transport import BrokerAddress, MqttTransport
from tests.edge_client.test_outbox_download import make_job

MODULES = {"0.q": (400, 300), "1.k": (5, 300)}
BASE = {"name": "toy", "sha256": "0" * 64, "parameters": 1000, "modules": MODULES}
JOB = make_job(rule="trust-validation", ladder=[2, 4], base=BASE)
EVERY = tuple(bands(JOB.ladder))
DEVICE = "phone"
NOW = Round(job="notes", number=2, state="open", version=2)


def adapter_of(level: float) -> Adapter:
    start = initial_adapter(MODULES, JOB.rank, JOB.scale, 0)
    return Adapter({n: Factors(f.a, f.b + level) for n, f in start.layers.items()}, JOB.scale)


def level_of(adapter: Adapter) -> float:
    return float(adapter.layers["0.q"].b[0, 0])


class LevelLearner:
    """Evaluate an adapter to the number that `adapter_of` put into it, and note its rank."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.on_third: Callable[[], None] = lambda: None

    def evaluate(self, adapter: Adapter | None, split: str = "held_out") -> float:
        assert adapter is not None and split == "trust"
        self.ranks.append(adapter.rank)
        if len(self.ranks) == 3:
            self.on_third()
        return level_of(adapter)


class Shop:
    """Publish adapters as an aggregator does, or not quite."""

    def __init__(self, broker: BrokerAddress) -> None:
        self._key = SigningKey.generate()
        self._link = MqttTransport(broker, "test-shop", temporary=True)
        self._link.connect()

    def put(self, source: Source, level: float, *, broken: bool = False, **more: object) -> None:
        adapter = adapter_of(level)
        files = {b: encode(to_tensors(cut(adapter, b)), JOB.encoding_down) for b in EVERY}
        for band, data in files.items():
            for index, chunk in enumerate(split(data)):
                kind = f"{source.kind}_chunk"
                fields = {"version": source.version, "number": source.number}
                name = topics.topic(
                    kind, job="notes", device=DEVICE, **fields, band=band.name, index=index
                )
                self._send(name, chunk[:-1] + b"!" if broken else chunk)
        manifest = GlobalManifest.model_validate(
            {
                "job": "notes",
                "version": source.version,
                "parent": source.version - 1,
                "encoding": JOB.encoding_down,
                "bands": {band.name: describe_file(data) for band, data in files.items()},
                **more,
            }
        )
        self._send(source.manifest_topic, self._key.seal(manifest, source.manifest_topic))

    def _send(self, name: str, payload: bytes) -> None:
        self._link.publish(name, payload, retain=True).check()

    def close(self) -> None:
        self._link.close()


class Phone:
    """A device that does nothing but fetch and try."""

    def __init__(
        self, broker: BrokerAddress, state: Path, *, policy: Policy | None = None, blocks: int = 0
    ) -> None:
        self.link = MqttTransport(broker, "test-phone", temporary=True)
        self.link.connect()
        self._said = io.StringIO()
        self.learner = LevelLearner()
        profile = load_profile("laptop-16gb")
        settings = Settings(DEVICE, broker, (), state, state, profile, job="notes")
        settings = replace(settings, policy=policy or settings.policy)
        self.outbox = Outbox(state)
        events = EventLog(as_json=True, stream=self._said)
        self.adapters = Adapters(
            settings,
            JOB,
            self.link,
            self.outbox,
            self.learner,  # type: ignore[arg-type]
            events,
            reach=lambda: Reach(2, JOB.rank, blocks),
        )

    def settle(self, now: Round) -> None:
        """Go on until nothing more is missing, as the agent does."""
        while self.adapters.fetch_next(now):
            incoming = self.link.receive(0.05)
            if incoming is None:
                self.adapters.wait(now)
                continue
            self.link.ack(incoming)
            found = topics.match(incoming.topic)
            if self.adapters.expects(found):
                self.adapters.take(found, incoming, now)

    def said(self, kind: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self._said.getvalue().splitlines()]
        return [event for event in events if event["event"] == kind]

    def close(self) -> None:
        self.link.close()
        self.outbox.close()


@pytest.fixture
def shop(mosquitto: BrokerAddress) -> Iterator[Shop]:
    made = Shop(mosquitto)
    yield made
    made.close()


@pytest.fixture
def phone(mosquitto: BrokerAddress, tmp_path: Path) -> Iterator[Phone]:
    made = Phone(mosquitto, tmp_path / "phone")
    yield made
    made.close()


def source(kind: Any, version: int = 2, number: int = 0) -> Source:
    return Source("notes", DEVICE, kind, version, number)


def test_what_is_broken_or_never_comes_is_left_out_and_the_others_are_tried(
    shop: Shop, phone: Phone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_client.adapters, "PATIENCE_TICKS", 5)
    shop.put(source("personal"), 0.5)
    shop.put(source("trial"), 0.25, broken=True)
    for number, level in enumerate([0.75, 0.375, float("nan"), 1e7]):
        if number != 1:  # which is announced and is not there
            shop.put(source("candidate", number=number), level)
    shop.put(
        source("global"), 0.125, personal={DEVICE: 2, "tablet": 1}, trials=[DEVICE], candidates=4
    )
    phone.settle(NOW)
    held = phone.adapters.held
    assert held.adapter is not None and level_of(held.adapter) == 0.5
    assert (held.version, held.personal) == (2, 2)
    assert str(held.source) == "its own adapter of version 2"
    assert phone.adapters.begin_trying(NOW)
    phone.settle(NOW)
    assert not phone.adapters.begin_trying(NOW), "once a version"
    assert phone.adapters.trying is not None
    answer = phone.adapters.trying.answer()
    assert answer is not None
    assert (answer.received, answer.own, answer.trial) == (0.5, None, None)
    assert answer.candidates == {0: 0.75}
    why = {event["adapter"]: event["reason"] for event in phone.said("not-tried")}
    assert set(why) == {
        "the trial of version 2",
        *(f"candidate {n} of version 2" for n in (1, 2, 3)),
    }
    assert "hash" in why["the trial of version 2"]
    assert why["candidate 1 of version 2"] == "nothing of it has come"
    assert "not finite" in why["candidate 2 of version 2"]
    assert why["candidate 3 of version 2"] == "its loss is 10000000.0"


@pytest.mark.parametrize(("blocks", "held"), [(0, 2), (1, 4)])
def test_what_an_update_of_some_blocks_leaves_of_a_rounds_traffic_is_downloaded(
    shop: Shop, mosquitto: BrokerAddress, tmp_path: Path, blocks: int, held: int
) -> None:
    every = parameter_count(MODULES, JOB.rank) * bytes_each(JOB.encoding_down)
    update = {
        n: parameter_count({n: s}, 2) * bytes_each(JOB.encoding_up) for n, s in MODULES.items()
    }
    limit = every + (update["1.k"] + sum(update.values())) / 2
    phone = Phone(
        mosquitto, tmp_path / "phone", policy=Policy(mib_a_round=limit / (1 << 20)), blocks=blocks
    )
    try:
        shop.put(source("global"), 0.125)
        phone.settle(NOW)
        adapter = phone.adapters.held.adapter
        assert adapter is not None and adapter.rank == held
    finally:
        phone.close()


def test_a_device_that_has_to_hold_less_measures_all_anew(shop: Shop, phone: Phone) -> None:
    for number in range(2):
        shop.put(source("candidate", number=number), 0.75)
    shop.put(source("global"), 0.125, candidates=2)
    phone.settle(NOW)
    phone.learner.on_third = lambda: phone.adapters.truncate(2)
    while phone.adapters.begin_trying(NOW):
        phone.settle(NOW)
    assert phone.learner.ranks == [4, 4, 4, 2, 4, 4], "the plan cuts what is tried, not this one"
    assert phone.adapters.trying is not None
    answer = phone.adapters.trying.answer()
    assert answer is not None and answer.candidates == {0: 0.75, 1: 0.75}


def test_in_the_end_the_common_adapter_is_fetched_beside_its_own(shop: Shop, phone: Phone) -> None:
    shop.put(source("personal", 1), 0.5)
    shop.put(source("global", 1), 0.125, personal={DEVICE: 1})
    phone.settle(Round(job="notes", number=1, state="open", version=1))
    assert phone.adapters.held.common is None
    shop.put(source("global"), 0.25, personal={DEVICE: 1})
    phone.settle(Round(job="notes", number=2, state="finished", version=2))
    held = phone.adapters.held
    assert held.adapter is not None and held.common is not None
    assert (level_of(held.adapter), level_of(held.common)) == (0.5, 0.25)
    assert (held.version, held.personal) == (2, 1)


def test_without_its_own_a_device_goes_on_with_the_common_one(shop: Shop, phone: Phone) -> None:
    shop.put(source("global"), 0.125, personal={"tablet": 2})
    phone.settle(Round(job="notes", number=2, state="finished", version=2))
    held = phone.adapters.held
    assert held.adapter is not None and level_of(held.adapter) == 0.125
    assert (held.personal, held.common) == (None, None)
