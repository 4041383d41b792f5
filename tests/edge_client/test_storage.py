"""A full disk and a damaged outbox: one clear line, and the next start goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from math import inf
from pathlib import Path

import pytest

from edge_client.calibrate import _remembered
from edge_client.errors import StorageError
from edge_client.outbox import FILE, Outbox
from edge_client.storage import keep_adapter
from edge_client.trainer.probing import ProbeReport
from edge_client.trust import open_trusted
from protocol import topics
from protocol.adapter import initial_adapter
from protocol.messages import BaseModelInfo, Round
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, Incoming
from tests.edge_client.test_outbox_download import MODULES, manifest
from tests.faults.processes import Program
from tests.faults.small_disk import MIB, fill, mounted

pytestmark = pytest.mark.timeout(120)
TOY = BaseModelInfo(name="toy", sha256="0" * 64, parameters=1, modules=MODULES)
FULL = "the disk is full: .* can't be kept in {}; free some space and start again"


class Disk:
    """A disk of half a MiB."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ballast = path
        self.state = path / "state"

    def fill(self) -> None:
        self._ballast = fill(self._path)

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", MIB // 2) as why:
        if why:
            pytest.skip(why)
        yield Disk(tmp_path / "disk")


def test_an_update_that_finds_no_room_leaves_the_others(disk: Disk) -> None:
    outbox = Outbox(disk.state)
    outbox.put(manifest(1), b"one", rank=8)
    disk.fill()
    with pytest.raises(StorageError, match=FULL.format(disk.state)) as caught:
        outbox.put(manifest(2), b"x" * 300_000, rank=4)
    assert "\n" not in str(caught.value)
    outbox.close()
    disk.free()
    outbox = Outbox(disk.state)
    assert outbox.pending() == [manifest(1).upload]
    assert (outbox.rank("notes", 16), outbox.trained_round("notes")) == (8, 1)
    outbox.put(manifest(2), b"two", rank=4)
    assert outbox.trained_round("notes") == 2
    outbox.close()


def test_no_room_for_a_key_an_adapter_or_what_was_measured(disk: Disk) -> None:
    disk.state.mkdir()
    disk.fill()
    topic = topics.topic("round", job="notes")
    said = SigningKey.generate().seal(Round(job="notes", number=1, state="open", version=1), topic)
    incoming = Incoming(topic, said, False, 1, 1)
    with pytest.raises(StorageError, match=FULL.format(disk.state)):
        open_trusted(incoming, Round, disk.state)
    adapter = initial_adapter(MODULES, 8, 2.0, 0)
    with pytest.raises(StorageError, match=FULL.format(disk.state)):
        keep_adapter(adapter, disk.state / "adapter", TOY)
    report = ProbeReport(1.0, 2.0, {})
    with pytest.raises(StorageError, match=FULL.format(disk.state)):
        _remembered(disk.state / "constants.json", inf, lambda: report)
    disk.free()
    assert open_trusted(incoming, Round, disk.state).number == 1
    keep_adapter(adapter, disk.state / "adapter", TOY)
    assert _remembered(disk.state / "constants.json", inf, lambda: report) == report


def test_the_command_says_it_in_one_line_and_goes_on_at_the_next_start(
    disk: Disk, tmp_path: Path, mosquitto: BrokerAddress
) -> None:
    (tmp_path / "notes.txt").write_text("some text")
    arguments = ["run", "--json", "--data", tmp_path / "notes.txt", "--profile", "laptop-16gb"]
    arguments += ["--broker", mosquitto, "--state", disk.state, "--cache", tmp_path / "cache"]
    disk.state.mkdir()
    disk.fill()
    with ExitStack() as stack:
        full = stack.enter_context(Program("edge_client", arguments, tmp_path, "full"))
        assert full.wait() == 1
        assert full.stderr.count("\n") == 1
        assert full.stderr.startswith("error: ")
        assert "No space left" in full.stderr or "the disk is full" in full.stderr
        disk.free()
        again = stack.enter_context(Program("edge_client", arguments, tmp_path, "again"))
        again.wait_for("state", state="waiting for a job")
        assert again.end(15) == 0


def test_a_damaged_outbox_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    whole = Outbox(tmp_path)
    for number in range(1, 30):
        whole.put(manifest(number), b"x" * 9000, rank=8)
    whole.close()
    path = tmp_path / FILE
    good = path.read_bytes()
    broken = good[:4096] + b"?" * 60_000 + good[64_096:]
    for damage in (b"no database" * 100, broken):
        path.write_bytes(damage)
        with pytest.raises(StorageError, match=f"{FILE} in .* the file is damaged") as caught:
            Outbox(tmp_path).pending()
        assert "--state" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == damage
