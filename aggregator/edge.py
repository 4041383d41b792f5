"""Asking `edge-client` for what takes torch, in a process of its own, where torch is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from aggregator.errors import ConfigError


def ask_edge(*arguments: str, otherwise: str) -> str:
    """Run an `edge-client` command and return what it prints.

    Raises:
        ConfigError: torch is not installed, and then says what to do `otherwise`; or the command
            failed, and then what it says.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(otherwise)
    command = [sys.executable, "-m", "edge_client", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        why = answer.stderr.strip().splitlines() or [f"edge-client {arguments[0]} failed"]
        raise ConfigError(why[-1].removeprefix("error: "))
    return answer.stdout
