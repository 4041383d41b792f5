"""What every fault test needs: the described model, and calibrations measured once a session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.transport import BrokerAddress
from tests.faults.processes import Program, SmallFleet


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the description of base-tiny, so that no aggregator has to ask for it."""
    path = tmp_path_factory.mktemp("model") / "model.json"
    command = [sys.executable, "-m", "edge_client", "describe", "base-tiny"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.fixture(scope="session")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the devices of this session remember what they measured."""
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture
def start() -> Iterator[Callable[[Program], Program]]:
    """Return what registers a program, so that none outlives its test."""
    with ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    mosquitto: BrokerAddress,
    model_file: Path,
    calibrations: Path,
    start: Callable[[Program], Program],
) -> SmallFleet:
    """Return a fleet of two devices, none of its processes started.

    A parameter gives the steps of a round; many of them are time to kill somebody in.
    """
    steps = getattr(request, "param", 2)
    return SmallFleet(tmp_path, mosquitto, model_file, calibrations, start, steps=steps)
