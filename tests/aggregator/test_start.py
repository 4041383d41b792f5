"""Where the aggregator's key comes from, and what a start that fails leaves behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.alone import check_alone
from aggregator.errors import StoreError
from aggregator.identity import default_key, signing_key
from aggregator.rounds import RoundState
from aggregator.store import Store
from device_profiles.replay import Options, _start_aggregator
from edge_client.trust import open_trusted
from protocol import topics
from protocol.broker import free_port
from protocol.errors import BadSignature, StateError
from protocol.messages import Job, Round
from protocol.signing import SigningKey
from protocol.transport import BrokerAddress, MqttTransport
from tests.aggregator.uploading import make_job
from tests.faults.processes import Listener, Program

pytestmark = pytest.mark.timeout(120)
Serve = Callable[..., Program]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return what starts `aggregator serve` on a job and state of a name."""
    with ExitStack() as stack:

        def start(name: str, broker: BrokerAddress | None, *more: object) -> Program:
            file = tmp_path / f"{name}.json"
            file.write_text(json.dumps({**make_job().model_dump(), "job": name}))
            options = ["--broker", broker] if broker else []
            state = tmp_path / f"state of {name}"
            arguments = ["serve", file, "--state", state, "--json", *options, *more]
            return stack.enter_context(Program("aggregator", arguments, tmp_path, name))

        yield start


def trusted_job(broker: BrokerAddress, name: str, device: Path) -> Job:
    """Return the job that the broker shows, as a device with this state reads it."""
    topic = topics.topic("job", job=name)
    listener = Listener(broker, topic, f"device-{name}")
    try:
        return open_trusted(listener.wait_for(lambda m: bool(m.payload)), Job, device)
    finally:
        listener.close()


def test_a_device_takes_two_jobs_in_a_row(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    """Each job has a state of its own; the key that the device remembers is one for both."""
    for name in ("notes", "letters"):
        aggregator = serve(name, mosquitto)
        aggregator.wait_for("serving")
        assert trusted_job(mosquitto, name, tmp_path / "device").job == name
        assert aggregator.end(signal.SIGTERM) == 0
    key = tmp_path / "home" / "tunefleet" / "aggregator.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    other = serve("third", mosquitto, "--key", tmp_path / "other.key")
    other.wait_for("serving")
    with pytest.raises(BadSignature, match="another key"):
        trusted_job(mosquitto, "third", tmp_path / "device")


def test_a_job_that_is_done_is_not_served_on(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    first = serve("notes", mosquitto)
    first.wait_for("serving")
    assert first.end(signal.SIGTERM) == 0
    store = Store(tmp_path / "state of notes")
    store.set_round(RoundState(6, "finished", 1, None))
    store.close()
    again = serve("notes", mosquitto, "--exit-when-done")
    assert again.wait() == 0
    (serving,) = again.of("serving")
    assert (serving["round"], serving["state"]) == (6, "finished")


def test_which_key(tmp_path: Path) -> None:
    state = tmp_path / "state"
    usual = signing_key(state)
    assert usual.public == SigningKey.load(default_key()).public == signing_key(state).public
    old = SigningKey.load_or_create(state / "aggregator.key")
    assert signing_key(state).public == old.public, "an older state goes on with its own"
    named = signing_key(state, tmp_path / "named.key")
    assert named.public not in (usual.public, old.public)
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="can't keep the signing key"):
        signing_key(state, tmp_path / "file" / "key")


def test_a_replay_leaves_the_users_key_alone(tmp_path: Path) -> None:
    class Started:
        arguments: Sequence[object] = ()

        def start(self, name: str, module: str, arguments: Sequence[object]) -> None:
            self.arguments = arguments

    _start_aggregator(started := Started(), Options(tmp_path), tmp_path)  # type: ignore[arg-type]
    at = list(started.arguments).index("--key")
    assert started.arguments[at + 1] == tmp_path / "aggregator.key"


# -- a start that fails ------------------------------------------------------------------------


def test_a_start_that_fails_leaves_the_state_to_any_job(
    tmp_path: Path, mosquitto: BrokerAddress, serve: Serve
) -> None:
    state = tmp_path / "state"
    nobody = BrokerAddress("127.0.0.1", free_port())
    unreachable = serve("notes", nobody, "--state", state, "--no-wait")
    assert unreachable.wait() == 1
    assert unreachable.stderr.startswith("error: no MQTT broker at"), unreachable.stderr

    running = serve("letters", mosquitto)
    running.wait_for("serving")
    refused = serve("letters", mosquitto, "--state", state, "--key", tmp_path / "other.key")
    assert refused.wait() == 1
    assert "from another aggregator" in refused.stderr
    store = Store(state)
    assert (store.job(), store.round()) == (None, RoundState(0, "waiting", 0, None))
    store.close()
    fresh = serve("letters", mosquitto, "--state", state)  # and with the same key
    assert fresh.wait() == 1
    assert "from another --state" in fresh.stderr
    assert not running.of("reconnected"), "its session was left to it"
    serve("third", mosquitto, "--state", state).wait_for("serving")


def test_a_job_on_somebodys_embedded_broker(tmp_path: Path, serve: Serve) -> None:
    first = serve("notes", None, "--port", 0)
    broker = BrokerAddress.parse(first.wait_for("broker")["address"])
    first.wait_for("serving")
    options = ["--state", tmp_path / "state", "--key", tmp_path / "other.key"]
    second = serve("notes", broker, *options)
    assert second.wait() == 1
    assert "from another aggregator" in second.stderr
    assert first.end(signal.SIGTERM) == 0


def test_what_the_broker_has_of_a_job(mosquitto: BrokerAddress) -> None:
    key, now = SigningKey.generate(), RoundState(2, "open", 2, None)
    check_alone(mosquitto, "notes", key.public, now)  # nothing
    link = MqttTransport(mosquitto, "test-before")
    link.connect()

    def said(message: Job | Round, kind: str) -> None:
        topic = topics.topic(kind, job="notes")
        link.publish(topic, key.seal(message, topic), retain=True).check()

    many = {f"layers.{n}.mlp": (4096, 4096) for n in range(3000)}
    base = {"name": "large", "sha256": "0" * 64, "parameters": 1, "modules": many}
    said(make_job(base=base), "job")  # a message that takes its time
    said(Round(job="notes", number=2, state="open", version=2), "round")
    check_alone(mosquitto, "notes", key.public, now)
    with pytest.raises(StoreError, match=r"from another aggregator.*another job name"):
        check_alone(mosquitto, "notes", SigningKey.generate().public, now)
    with pytest.raises(StoreError, match=r"another --state of .*`aggregator withdraw notes`"):
        check_alone(mosquitto, "notes", key.public, RoundState(0, "waiting", 0, None))
    with pytest.raises(StoreError, match="in round 2, attempt 0; this state is in round 1"):
        check_alone(mosquitto, "notes", key.public, RoundState(1, "open", 1, None))
    link.close()


def test_a_broker_that_keeps_the_echo_back(
    mosquitto_read_only: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aggregator.kept.PATIENCE_S", 0.5)
    check_alone(mosquitto_read_only, "notes", "", RoundState(0, "waiting", 0, None))


def test_threads_are_limited_before_numpy_reads_the_limit() -> None:
    program = """
import os, sys
from aggregator import cli
assert "numpy" not in sys.modules
sys.argv = ["aggregator", "--help"]
try:
    cli.main()
finally:
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert os.environ["MKL_NUM_THREADS"] == "3", "what the operator says stands"
"""
    env = {**os.environ, "MKL_NUM_THREADS": "3"}
    env.pop("OPENBLAS_NUM_THREADS", None)
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr
