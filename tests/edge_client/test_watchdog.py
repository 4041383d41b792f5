"""A training process does not go beyond the owner's cap: it is ended there, and that is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.errors import WorkerKilled
from edge_client.trainer.process import TrainingProcess
from edge_client.trainer.watchdog import Watchdog, resident_mib

GROW = "import time; held = []\nwhile True: held.append(b'x' * (8 << 20)); time.sleep(0.01)"
MAP = """
import mmap, sys, time
with open(sys.argv[1], 'rb') as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(view[::4096])
print('read', flush=True)
time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_a_process_is_ended_at_its_limit_and_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", GROW]) as process:
        watchdog = Watchdog(process.pid, 100)
        assert process.wait(30) == -9
    assert watchdog.killed_at_mib is not None
    assert 100 <= watchdog.killed_at_mib < 400


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a file's pages apart")
def test_a_file_that_is_read_counts_only_once_training_has_begun(tmp_path: Path) -> None:
    file = tmp_path / "base"
    file.write_bytes(os.urandom(64 << 20))
    command = [sys.executable, "-c", MAP, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        whole, own = resident_mib(process.pid), resident_mib(process.pid, files=False)
        assert whole is not None
        assert own is not None
        assert whole - own > 64
        process.kill()
    assert resident_mib(process.pid) is None


@pytest.mark.timeout(120)
def test_the_agent_is_told_that_it_was_the_limit() -> None:
    with TrainingProcess(8.0) as process, pytest.raises(WorkerKilled) as caught:
        process.call("memory")
    said = str(caught.value)
    assert "it may take 8 MiB in all" in said
    assert "\n" not in said
