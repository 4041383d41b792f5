"""What was right once, or was never right: refused and logged on the device, over restarts too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_client.outbox import Outbox
from protocol import topics
from protocol.errors import Replayed
from protocol.messages import Round
from protocol.signing import SigningKey
from protocol.transport import MqttTransport
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program
from tests.security.fleet import Fleet

pytestmark = pytest.mark.timeout(120)
ROUND = topics.topic("round", job="notes")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def sealed(key: SigningKey, number: int, version: int) -> bytes:
    return key.seal(Round(job="notes", number=number, state="open", version=version), ROUND)


class Device:
    """A real `edge-client run` that hears rounds and no job, so that it never trains."""

    def __init__(self, fleet: Fleet, folder: Path, stack: ExitStack) -> None:
        (folder / "notes.txt").write_text("some text")
        self.arguments = [
            "run",
            "--data",
            folder / "notes.txt",
            "--job",
            "notes",
            "--json",
            "--state",
        ]
        self.arguments += [str(fleet.devices / "kitchen")]
        self.folder, self.stack = folder, stack

    def start(self) -> Program:
        program = Program("edge_client", self.arguments, self.folder, "kitchen")
        return self.stack.enter_context(program)


def say(link: MqttTransport, payload: bytes) -> None:
    link.publish(ROUND, payload, retain=True).check()


def test_old_rounds_and_forged_ones_are_refused(
    fleet: Fleet, tmp_path: Path, stack: ExitStack
) -> None:
    fleet.join("kitchen")
    key, link = fleet.folder.signing_key(), fleet.aggregator()
    device = Device(fleet, tmp_path, stack)
    say(link, sealed(key, 5, 4))
    first = device.start()
    first.wait_for("round", round=5)
    for payload, why in (
        (sealed(SigningKey.generate(), 6, 5), "another key"),
        (sealed(key, 6, 5).replace(b'\\"number\\":6', b'\\"number\\":7'), "does not fit"),
        (key.seal(Round(job="notes", number=6, state="open", version=5), "t"), "does not fit"),
        (b'{"body": "{}"}', "not signed"),
        (b"no JSON", "not JSON"),
        (sealed(key, 4, 4), "round 4 of job 'notes' is older than round 5"),
        (sealed(key, 5, 3), "version 3 of job 'notes' is older than version 4"),
    ):
        seen = len(first.of("refused"))
        say(link, payload)
        while len(first.of("refused")) == seen:
            with first._news:
                assert first._news.wait(10), why
        assert why in first.of("refused")[-1]["reason"]
    first.end(9)

    # The broker keeps the last of these: to a device that starts anew it is the first it hears.
    say(link, sealed(key, 4, 3))
    # What the one before had not acknowledged when it was killed may come once more ahead of it.
    second = device.start()
    reasons = [second.wait_for("refused")["reason"]]
    if "version 3" in reasons[0]:
        while len(second.of("refused")) < 2:
            with second._news:
                assert second._news.wait(10), reasons
        reasons = [second.of("refused")[1]["reason"]]
    assert "older than round 5" in reasons[0]
    say(link, sealed(key, 6, 5))
    second.wait_for("round", round=6)
    assert [e["round"] for e in second.of("round")] == [6]


def test_the_newest_round_and_the_jobs_settings_are_kept(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    job = make_job()
    outbox.check_job(job)
    outbox.check_round(Round(job="notes", number=3, state="open", version=3))
    outbox.close()
    again = Outbox(tmp_path)
    again.check_job(job)
    with pytest.raises(Replayed, match="other settings"):
        again.check_job(make_job(rounds=99))
    again.check_job(make_job(job="letters", rounds=99))
    for number, version in ((2, 3), (3, 2), (2, 9)):
        with pytest.raises(Replayed):
            again.check_round(Round(job="notes", number=number, state="open", version=version))
    # A refused message leaves no trace; the same one again is no replay of an older one.
    again.check_round(Round(job="notes", number=3, state="open", version=3))
    again.check_round(Round(job="notes", number=3, state="finished", version=4))
    again.check_round(Round(job="letters", number=1, state="open", version=1))
    again.close()
