"""No child outlives its parent, even one whose parent is killed or that will not listen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from protocol.lifeline import lifeline, tied_environment

command = [sys.executable, "-c", sys.argv[1]]
for _ in range(2):
    subprocess.Popen(command, stdin=lifeline(), env=tied_environment(), stdout=sys.stdout)
time.sleep(600)
"""
CHILD = """
import os, signal, time
from protocol import lifeline

lifeline.GRACE_S = 0.1
{first}
lifeline.end_with_parent()
assert lifeline.TIED not in os.environ
os.write(1, b"%d\\n" % os.getpid())  # in one piece, for two write to one pipe
time.sleep(600)
"""


def family(child: str) -> tuple[subprocess.Popen[str], Sequence[psutil.Process]]:
    """Start a parent with two children; return it and them, once both watch."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]


@pytest.mark.parametrize("first", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_children_end_with_a_parent_that_is_killed(first: str) -> None:
    parent, children = family(CHILD.format(first=first))
    with parent:
        assert all(child.is_running() for child in children)
        parent.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []
