"""Connections to the broker's port that say nothing, of somebody without a certificate."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from protocol.errors import BrokerUnreachable
from protocol.transport import MqttTransport
from tests.conftest import MOSQUITTO
from tests.security.fleet import LEAVES_SOCKET, FleetFolder, make_folder

pytestmark = [pytest.mark.timeout(120), LEAVES_SOCKET]

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
SOFT = 1024
"""Files that a shell mostly lets a process open."""
SILENT = 1200
SAY_NOTHING = f"""
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
kept = []
for _ in range({SILENT}):
    try:
        kept.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 2))
    except OSError:
        pass
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def started(folder: FleetFolder, commands: str, hard: int) -> Iterator[None]:
    """Run a shell's commands, where the limit is what it is in most, until the broker is there."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    process = subprocess.Popen(
        ["bash", "-c", commands.replace("~/fleet", str(folder.path))],
        env={"PATH": f"{Path(MOSQUITTO).parent}:/usr/bin:/bin"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard)),
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", folder.port), 1):
                break
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def silent_connections(port: int) -> Iterator[None]:
    """Keep connections open, from another process: paho has room for 1024 files in this one."""
    command = [sys.executable, "-c", SAY_NOTHING, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate()


def connect(folder: FleetFolder) -> None:
    link = MqttTransport(folder.broker_here, "aggregator", tls=folder.tls, temporary=True)
    try:
        link.connect(5)
    finally:
        link.close()


@pytest.mark.parametrize("as_in_readme", [True, False])
def test_more_silent_connections_than_a_shell_allows(tmp_path: Path, as_in_readme: bool) -> None:
    """Without README's `ulimit` they lock others out, who are told what it may be."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2 * SILENT:
        pytest.skip(f"no process may have more than {hard} files open here")
    (block,) = re.findall(r"```sh\n[^`]*init ~/fleet[^`]*```", README)
    raising, start = block.splitlines()[2:4]
    assert "ulimit" in raising and "mosquitto -c" in start
    commands = [raising] if as_in_readme else []
    folder = make_folder(tmp_path / "fleet")
    with ExitStack() as stack:
        stack.enter_context(started(folder, "\n".join([*commands, f"exec {start}"]), hard))
        connect(folder)
        stack.enter_context(silent_connections(folder.port))
        if as_in_readme:
            connect(folder)
        else:
            with pytest.raises(BrokerUnreachable, match="has it too many connections"):
                connect(folder)
