"""A served job with personal adapters: a real aggregator on a real Mosquitto, light devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aggregator.store import Store
from protocol.faults import VARIABLE
from protocol.messages import Job
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import run_until
from tests.aggregator.personal.personal_device import Losses, PersonalDevice
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

SIZES = {"attic": 0.02, "barn": 0.03, "cellar": -0.02, "den": -0.03}
"""What each device's update is made of: the first two are alike, and so are the others."""


class Fleet:
    """One job, its aggregator and its devices; the devices end with the test."""

    def __init__(self, folder: Path, broker: BrokerAddress, stack: ExitStack, job: Job) -> None:
        self.folder, self.broker, self.job = folder, broker, job
        self.state = folder / "state"
        self._stack = stack
        self.devices: dict[str, PersonalDevice] = {}
        self.aggregators: list[Program] = []
        (folder / "job.json").write_text(
            json.dumps({**job.model_dump(), "policy": {"min_devices": 4, "quorum": 2}})
        )

    def serve(self, point: str = "") -> Program:
        arguments = ["serve", self.folder / "job.json", "--state", self.state, "--json"]
        arguments += ["--broker", self.broker, "--exit-when-done"]
        made = Program(
            "aggregator",
            arguments,
            self.folder,
            "aggregator",
            environment={VARIABLE: point} if point else {},
        )
        self.aggregators.append(self._stack.enter_context(made))
        return made

    def join(
        self, name: str, losses: Losses = lambda *_: None, tokens: range | None = None
    ) -> PersonalDevice:
        size = SIZES[name]
        made = PersonalDevice(
            self.broker,
            self.folder / name,
            name,
            self.job,
            lambda now: size * (1 + 0.1 * now.number),
            losses,
            tokens,
        )
        self.devices[name] = made
        return made

    def run(self, done: Callable[[], bool], *but: str) -> None:
        run_until(done, *(d for name, d in self.devices.items() if name not in but))

    def merged(self) -> int:
        return sum(len(one.of("merged")) for one in self.aggregators)

    def run_rounds(self, number: int) -> None:
        """Let devices take part until so many rounds are merged and they have what came of it."""

        def there() -> bool:
            return self.merged() >= number and all(
                device.round is not None and device.round.version == number + 1
                for device in self.devices.values()
            )

        self.run(there)

    def trust(self, number: int) -> dict[str, Any]:
        return next(e for a in self.aggregators for e in a.of("trust") if e["round"] == number)

    def store(self) -> Store:
        made = Store(self.state)
        self._stack.callback(made.close)
        return made


@pytest.fixture
def fleet_of(tmp_path: Path, mosquitto: BrokerAddress) -> Iterator[Callable[..., Fleet]]:
    """Return what begins a fleet on a job with these settings."""
    with ExitStack() as stack:
        fleets: list[Fleet] = []

        def begin(rule: str, *, broker: BrokerAddress = mosquitto, **settings: Any) -> Fleet:
            fields = {"ladder": [2, 4], "encoding_up": "f32", "encoding_down": "f32", **settings}
            folder = tmp_path / f"fleet-{len(fleets)}"
            folder.mkdir()
            fleets.append(Fleet(folder, broker, stack, make_job(rule=rule, **fields)))
            return fleets[-1]

        yield begin
        for device in (d for fleet in fleets for d in fleet.devices.values()):
            device.close()
