"""All that is kept, others on the same computer can't read, even in a folder they may enter."""

from __future__ import annotations

import json
import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.store import Store
from edge_client.outbox import FILE, Outbox
from protocol.files import lock_folder, write_durably
from protocol.transport import BrokerAddress
from tests.edge_client.test_outbox_download import manifest
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return a state folder that is there already, and that everybody may enter."""
    before = os.umask(0o022)
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    os.umask(before)
    return folder


def open_to_others(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and stat.S_IMODE(p.stat().st_mode) & 0o077]


def test_what_is_written_to_a_locked_folder_is_private(state: Path) -> None:
    before = os.umask(0o022)
    try:
        with lock_folder(state, "edge-client"):
            write_durably(state / "adapter" / "adapter_model.safetensors", b"x")
            outbox = Outbox(state)
            outbox.put(manifest(1), b"a whole update", rank=8)
            assert len(list(state.glob(f"{FILE}*"))) == 3, "with what SQLite keeps beside it"
            assert open_to_others(state) == []
            outbox.close()
            assert stat.S_IMODE((state / "adapter").stat().st_mode) == 0o700
        assert os.umask(0o022) == 0o022, "as it was before"
    finally:
        os.umask(before)


@pytest.mark.parametrize(("made", "name"), [(Outbox, FILE), (Store, "store.sqlite")])
def test_a_database_that_others_could_read_is_closed_to_them(
    state: Path, made: type[Outbox] | type[Store], name: str
) -> None:
    made(state).close()
    (state / name).chmod(0o644)
    again = made(state)
    assert open_to_others(state) == []
    again.close()


def test_the_commands_keep_their_states_private(
    tmp_path: Path, state: Path, mosquitto: BrokerAddress
) -> None:
    device, text, job = tmp_path / "device", tmp_path / "notes.txt", tmp_path / "job.json"
    device.mkdir(mode=0o755)
    text.write_text("some text")
    base = {"name": "toy", "sha256": "0" * 64, "parameters": 1000, "modules": {"m": [8, 8]}}
    job.write_text(json.dumps({"job": "notes", "base": base, "ladder": [2, 4], "rounds": 1}))
    run = ["run", "--json", "--data", text, "--profile", "laptop-16gb"]
    run += ["--broker", mosquitto, "--state", device, "--cache", tmp_path / "cache"]
    serve = ["serve", job, "--json", "--state", state, "--broker", mosquitto]
    before = os.umask(0o022)
    try:
        with ExitStack() as stack:
            for command, arguments, seen in (
                ("edge_client", run, {"kind": "state", "state": "waiting for a job"}),
                ("aggregator", serve, {"kind": "serving"}),
            ):
                stack.enter_context(Program(command, arguments, tmp_path, command)).wait_for(**seen)
            assert (device / FILE).exists() and (state / "store.sqlite").exists()
            assert list((state / "versions").rglob("*.safetensors"))
            assert open_to_others(device) == [] and open_to_others(state) == []
    finally:
        os.umask(before)
