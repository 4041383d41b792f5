"""An artifact set on a real broker: published once, bounded, replaced, cleared."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aggregator.artifacts
from aggregator.artifacts import open_set, topics_of
from aggregator.cli import app
from aggregator.errors import ConfigError
from aggregator.kept import kept_messages
from protocol import topics
from protocol.artifact import FILES, GRAPH, MANIFEST, WEIGHTS
from protocol.chunks import CHUNK_BYTES
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.made_set import write_set
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

pytestmark = pytest.mark.timeout(180)
Serve = Callable[..., Program]
JOB = make_job()


@pytest.fixture
def serve(tmp_path: Path, mosquitto: BrokerAddress) -> Iterator[Serve]:
    """Return what starts `aggregator serve` on the one state, with more options."""
    (tmp_path / "job.json").write_text(JOB.model_dump_json())
    with ExitStack() as stack:

        def start(*more: object) -> Program:
            arguments = ["serve", tmp_path / "job.json", "--state", tmp_path / "state", "--json"]
            arguments += ["--broker", mosquitto, *more]
            return stack.enter_context(Program("aggregator", arguments, tmp_path, "aggregator"))

        yield start


def kept(broker: BrokerAddress) -> dict[str, bytes]:
    """Return what the broker keeps of the job's sets; a broker's queue is not made for many."""
    link = MqttTransport(broker, "test-look", temporary=True)
    link.connect()
    filters = [f"{topics.ROOT.format(job=JOB.job)}/onnx/#"]
    found = {m.topic: m.payload for m in kept_messages(link, JOB.job, filters)}
    link.close()
    return found


def test_a_set_is_published_whole_and_once(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    folder = write_set(tmp_path / "set", JOB)
    manifest = open_set(folder, JOB)
    first = serve("--onnx", folder)
    told = first.wait_for("onnx", state="published")
    assert (told["artifact"], told["bytes"]) == (manifest.artifact, manifest.bytes)
    found = kept(mosquitto)
    assert list(manifest.files) == [*FILES, MANIFEST]
    assert set(found) == set(topics_of(manifest))
    for name, info in manifest.files.items():
        place = {"job": JOB.job, "artifact": manifest.artifact, "file": name}
        chunks = [
            found[topics.topic("onnx_chunk", **place, index=i)] for i in range(len(info.chunks))
        ]
        assert b"".join(chunks) == (folder / name).read_bytes()
        assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)
    assert first.end(signal.SIGTERM) == 0
    again = serve("--onnx", folder)
    again.wait_for("serving")
    time.sleep(2 * aggregator.artifacts.QUIET_S)
    assert again.of("onnx") == []
    assert kept(mosquitto) == found


def test_another_set_takes_its_place_and_none_clears_it(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    old, new = (write_set(tmp_path / str(seed), JOB, seed=seed) for seed in (0, 1))
    first = serve("--onnx", old)
    first.wait_for("onnx", state="publishing")
    first.end(signal.SIGKILL)  # in the middle, or just after: the record is written before
    second = serve("--onnx", new)
    second.wait_for("onnx", state="cleared")
    second.wait_for("onnx", state="published")
    assert set(kept(mosquitto)) == set(topics_of(open_set(new, JOB)))
    second.end(signal.SIGTERM)
    serve().wait_for("onnx", state="cleared", artifact=open_set(new, JOB).artifact)
    assert kept(mosquitto) == {}


def test_withdrawing_a_job_takes_its_set_off(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    # More than Mosquitto queues for one client (1000), if it were asked for at once.
    folder = write_set(tmp_path / "set", JOB, chunks=1100)
    served = serve("--onnx", folder)
    served.wait_for("onnx", state="published")
    served.end(signal.SIGTERM)
    done = CliRunner().invoke(app, ["withdraw", JOB.job, "--broker", str(mosquitto)])
    assert done.exit_code == 0, done.output
    assert kept(mosquitto) == {}
    manifest = open_set(folder, JOB)
    link = MqttTransport(mosquitto, "test-stray", temporary=True)
    link.connect()
    strays = topics_of(manifest)[1:5]  # of a set that was never published whole
    for delivery in link.publish_all([(topic, b"x") for topic in strays], retain=True):
        delivery.check()
    link.close()
    done = CliRunner().invoke(app, ["withdraw", JOB.job, "--broker", str(mosquitto)])
    assert "4 messages cleared" in done.output
    assert kept(mosquitto) == {}


def test_a_set_that_changes_while_it_is_published_is_told_and_the_job_goes_on(
    tmp_path: Path, serve: Serve
) -> None:
    folder = write_set(tmp_path / "set", JOB)
    served = serve("--onnx", folder)
    served.wait_for("serving")
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(20 * CHUNK_BYTES)
        file.write(b"another")
    failed = served.wait_for("onnx", state="failed")
    assert "has changed" in failed["reason"]
    assert served.end(signal.SIGTERM) == 0


def test_what_can_not_be_published_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set", JOB)
    other = JOB.model_copy(update={"base": JOB.base.model_copy(update={"sha256": "1" * 64})})
    with pytest.raises(ConfigError, match=r"is of 'toy' \(hash 000.*not of the job's 'toy'"):
        open_set(folder, other)
    monkeypatch.setattr(aggregator.artifacts, "ARTIFACT_CHUNKS", 41)
    with pytest.raises(ConfigError, match=r"at most \d+ are published: .* copy it"):
        open_set(folder, JOB)
    monkeypatch.undo()
    graph = (folder / GRAPH).read_bytes()
    (folder / GRAPH).write_bytes(b"")
    with pytest.raises(ConfigError, match="its hash differs"):
        open_set(folder, JOB)
    (folder / GRAPH).write_bytes(graph)
    (folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ConfigError, match="its hash differs"):
        open_set(folder, JOB)
    (tmp_path / "job.json").write_text(json.dumps(JOB.model_dump(mode="json")))
    command = ["serve", str(tmp_path / "job.json"), "--state", str(tmp_path / "state")]
    refused = CliRunner().invoke(app, [*command, "--port", "0", "--onnx", str(tmp_path)])
    assert isinstance(refused.exception, ConfigError)
    assert "can't read" in str(refused.exception) and "\n" not in str(refused.exception)
