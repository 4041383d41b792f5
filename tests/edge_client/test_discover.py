"""Which job a device takes that was told none, and what happens to two of one name."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from device_profiles.schema import load_profile
from edge_client.config import Settings
from edge_client.discover import discover_job, enter_job, link_of
from edge_client.errors import ConfigError, NameTaken, OtherAggregator, StorageError
from edge_client.standing import Standing
from protocol import topics
from protocol.events import EventLog
from protocol.messages import Round, Status
from protocol.patience import Waiting
from protocol.signing import SigningKey, open_message
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import make_job

pytestmark = pytest.mark.timeout(60)
AGGREGATOR = SigningKey.generate()
LOG = EventLog(as_json=True, stream=io.StringIO())


def settings(broker: BrokerAddress, folder: Path) -> Settings:
    return Settings(
        name="kitchen",
        broker=broker,
        data=(folder,),
        state=folder,
        cache=folder,
        profile=load_profile("laptop-16gb"),
    )


@pytest.fixture
def connect(mosquitto: BrokerAddress) -> Iterator[Callable[[str], MqttTransport]]:
    with ExitStack() as stack:

        def make(client_id: str) -> MqttTransport:
            link = MqttTransport(mosquitto, client_id, temporary=True)
            stack.callback(link.close)
            link.connect()
            return link

        yield make


# -- which job -------------------------------------------------------------------------------------


def show(link: MqttTransport, job: str, state: str = "", key: SigningKey = AGGREGATOR) -> None:
    topic = topics.topic("job", job=job)
    link.publish(topic, key.seal(make_job(job=job), topic), retain=True).check()
    if state:
        topic = topics.topic("round", job=job)
        now = Round.model_validate({"job": job, "number": 1, "state": state, "version": 1})
        link.publish(topic, key.seal(now, topic), retain=True).check()


@pytest.mark.parametrize(
    ("shown", "taken"),
    [
        ({"a": "finished", "b": "open"}, "b"),
        ({"a": "open", "b": "finished"}, "a"),
        ({"a": "finished", "b": "waiting", "c": "finished"}, "b"),
        ({"a": "finished", "b": ""}, "b"),  # its aggregator is just starting
    ],
)
def test_the_job_that_is_not_finished_is_taken(
    tmp_path: Path,
    mosquitto: BrokerAddress,
    connect: Callable[[str], MqttTransport],
    shown: dict[str, str],
    taken: str,
) -> None:
    aggregator = connect("aggregator")
    for job, state in shown.items():
        show(aggregator, job, state)
    asked = settings(mosquitto, tmp_path)
    assert discover_job(asked, "", lambda: False, Waiting(LOG)) == taken


def test_with_finished_jobs_alone_a_device_says_so_once_and_waits(
    tmp_path: Path, mosquitto: BrokerAddress, connect: Callable[[str], MqttTransport]
) -> None:
    aggregator, stream = connect("aggregator"), io.StringIO()
    for job in ("b", "a"):
        show(aggregator, job, "finished")
    aggregator.publish("tunefleet/1/Not A Name/job", b"{}", retain=True).check()
    looks_since = 0

    def stopping() -> bool:
        """Show another job a while after it has been said that there is none."""
        nonlocal looks_since
        looks_since += bool(stream.getvalue())
        if looks_since == 4:
            show(aggregator, "c", "waiting")
        return False

    waiting = Waiting(EventLog(as_json=True, stream=stream))
    assert discover_job(settings(mosquitto, tmp_path), "", stopping, waiting) == "c"
    (said,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (said["what"], said["why"]) == ("another job", "finished: a, b")


@pytest.mark.parametrize("abandoned", ["open", "waiting", ""])
def test_of_several_unfinished_jobs_the_owner_chooses(
    tmp_path: Path,
    mosquitto: BrokerAddress,
    connect: Callable[[str], MqttTransport],
    abandoned: str,
) -> None:
    aggregator, stream = connect("aggregator"), io.StringIO()
    show(aggregator, "a", abandoned)
    show(aggregator, "b", "open")
    asked = settings(mosquitto, tmp_path)
    hasty = replace(asked, wait_for_broker=False)
    with pytest.raises(ConfigError, match="There are a, b: say --job"):
        discover_job(hasty, "", lambda: False, Waiting(LOG))
    assert discover_job(replace(hasty, job="a"), "", lambda: False, Waiting(LOG)) == "a"

    told: list[bool] = []

    def stopping() -> bool:
        """End one of the two once it has been said that there are two."""
        if stream.getvalue() and not told:
            told.append(True)
            show(aggregator, "a", "finished")
        return False

    waiting = Waiting(EventLog(as_json=True, stream=stream))
    assert discover_job(asked, "", stopping, waiting) == "b"
    (said,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (said["what"], said["why"]) == ("one job", "there are a, b: say which with --job")


def test_a_job_that_is_not_there_for_who_does_not_wait(
    tmp_path: Path, mosquitto: BrokerAddress, connect: Callable[[str], MqttTransport]
) -> None:
    aggregator = connect("aggregator")
    asked = replace(settings(mosquitto, tmp_path), job="nosuch", wait_for_broker=False)
    with pytest.raises(ConfigError, match=r"no job 'nosuch' at mqtt://.* \(there is none at all\)"):
        discover_job(asked, "", lambda: False, Waiting(LOG))
    show(aggregator, "a", "open")
    show(aggregator, "b", "finished")
    with pytest.raises(ConfigError, match=r"\(there are: a, b\); check --job"):
        discover_job(asked, "", lambda: False, Waiting(LOG))


def test_another_aggregators_job_is_passed_over_and_said_so_once(
    tmp_path: Path, mosquitto: BrokerAddress, connect: Callable[[str], MqttTransport]
) -> None:
    aggregator, stream = connect("aggregator"), io.StringIO()
    (tmp_path / "aggregator.pub").write_text(AGGREGATOR.public)
    show(aggregator, "a", "open", key=SigningKey.generate())

    told: list[bool] = []

    def stopping() -> bool:
        """Show a job of the trusted aggregator once it has been said that there is none."""
        if "waiting" in stream.getvalue() and not told:
            told.append(True)
            show(aggregator, "b", "open")
        return False

    waiting = Waiting(EventLog(as_json=True, stream=stream))
    assert discover_job(settings(mosquitto, tmp_path), "", stopping, waiting) == "b"
    refused, said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert refused["topic"] == "tunefleet/1/a/job" and "passed over" in refused["reason"]
    assert said["why"].startswith("signed by another: a; if that is right")
    assert str(tmp_path / "aggregator.pub") in said["why"]


def test_the_named_job_of_another_aggregator_ends_the_device(
    tmp_path: Path, mosquitto: BrokerAddress, connect: Callable[[str], MqttTransport]
) -> None:
    show(connect("aggregator"), "a", "open", key=SigningKey.generate())
    asked = replace(settings(mosquitto, tmp_path), job="a")
    pub = tmp_path / "aggregator.pub"
    pub.write_text(AGGREGATOR.public)
    with pytest.raises(OtherAggregator, match=f"remove {pub} or use another --state"):
        discover_job(asked, "", lambda: False, Waiting(LOG))
    for damaged in (b"", b"oops", b"\xff\x00", AGGREGATOR.public.encode()[:20]):
        pub.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"aggregator\.pub is damaged: it holds no key"):
            discover_job(asked, "", lambda: False, Waiting(LOG))
    pub.unlink()
    assert discover_job(asked, "", lambda: False, Waiting(LOG)) == "a"


# -- two of one name -------------------------------------------------------------------------------


class Device:
    """The part of an agent that goes by a name."""

    def __init__(self, broker: BrokerAddress, folder: Path) -> None:
        self.key = SigningKey.generate()
        self.settings = settings(broker, folder)
        self.waiting = Waiting(LOG)
        self.standing = Standing(self.settings, "notes", 1, self.key)
        self.link = link_of(self.settings, self.standing.will, self.waiting)

    def look(self) -> None:
        """Do what comes before a device connects by its own name."""
        known = (self.key.public, lambda: False, self.waiting)
        asked = replace(self.settings, job="notes")
        assert discover_job(asked, *known) == "notes"

    def enter(self) -> None:
        enter_job(self.settings, "notes", self.link, self.standing, lambda: False, self.waiting)

    def hear(self, seconds: float) -> None:
        """Take in what comes for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (incoming := self.link.receive(0.1)) is not None:
                self.link.ack(incoming)
                if topics.match(incoming.topic).kind == "status":
                    self.standing.hear(self.link, incoming.payload)


def kept(link: MqttTransport) -> tuple[Status, str]:
    topic = topics.topic("status", job="notes", device="kitchen")
    link.subscribe([topic])
    incoming = link.receive(5)
    assert incoming is not None
    return open_message(incoming.payload, topic, Status)


def test_a_device_says_that_it_plans_as_soon_as_it_is_there(
    tmp_path: Path, mosquitto: BrokerAddress, connect: Callable[[str], MqttTransport]
) -> None:
    first, second = (Device(mosquitto, tmp_path) for _ in range(2))
    first.look()
    first.enter()
    status, key = kept(connect("look"))
    assert (status.state, status.online, status.rank) == ("planning", True, 0)
    assert key == first.key.public
    with pytest.raises(NameTaken, match="'notes' as 'kitchen'; choose another --name"):
        second.look()
    assert first.link.connection == 1, "the first one was pushed off"
    first.link.close()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_of_two_that_came_at_once_the_second_ends_and_the_first_goes_on(
    tmp_path: Path,
    mosquitto: BrokerAddress,
    connect: Callable[[str], MqttTransport],
    version: str,
) -> None:
    address = BrokerAddress(mosquitto.host, mosquitto.port, version=version)
    first, second = (Device(address, tmp_path) for _ in range(2))
    for device in (first, second):
        device.look()  # neither has said anything yet
    first.enter()
    first.hear(0.5)
    second.enter()
    with pytest.raises(NameTaken):
        second.hear(10)
    first.hear(5)  # comes back, and hears what the second one has said
    assert first.link.connected
    first.standing.announce(first.link, "idle", rank=2)
    first.hear(0.5)
    status, key = kept(connect("look"))
    assert (key, status.state, status.online) == (first.key.public, "idle", True)
    first.link.close()
