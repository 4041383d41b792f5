"""A fleet that is served for real, its page with it: aggregator, Mosquitto and light devices."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from aggregator.view import StateView
from protocol.messages import Job, Training
from protocol.transport import BrokerAddress
from tests.aggregator.light_device import LightDevice
from tests.aggregator.page.site import Site
from tests.aggregator.uploading import make_job
from tests.faults.processes import Program

DEADLINE_S = 3600


class LiveFleet:
    """Devices that take part on a thread of their own, and the aggregator that serves them."""

    def __init__(self, folder: Path, program: Program, broker: BrokerAddress, job: Job) -> None:
        self.program = program
        self.state = folder / "state"
        self.url: str = program.wait_for("page")["url"]
        self.site = Site(urlsplit(self.url).port or 0)
        self.failed: BaseException | None = None
        self._folder, self._broker, self._job = folder, broker, job
        self._leaving: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def view(self) -> StateView:
        return StateView(self.state)

    def leave(self, name: str) -> None:
        """Have a device go away, and say so as its will would."""
        self._leaving.put(name)

    def start(self, devices: int) -> None:
        """Have devices take part, in turn: what they hold belongs to their thread."""
        self._thread = threading.Thread(target=self._run, args=(devices,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(20)
        assert self.failed is None, self.failed

    def _run(self, count: int) -> None:
        devices = {}
        try:
            for n in range(count):
                devices[f"device-{n}"] = self._device(f"device-{n}", n)
            while not self._ended.is_set():
                if not self._leaving.empty():
                    devices.pop(self._leaving.get()).leave()
                for device in devices.values():
                    device.step()
        except BaseException as error:
            self.failed = error
        finally:
            for device in devices.values():
                device.close()

    def _device(self, name: str, number: int) -> LightDevice:
        size = 1e-4 * (1 + number)
        folder = self._folder / name
        device = LightDevice(self._broker, folder, name, self._job, lambda now: size)
        device.metrics = {"held_out_loss": 3.0 + number / 10}
        return device


@contextmanager
def live_fleet(
    folder: Path, broker: BrokerAddress, *, devices: int = 6, rounds: int = 100_000
) -> Iterator[LiveFleet]:
    """Serve a job with so many light devices, which train as long as the block lasts."""
    job = live_job(rounds)
    file = folder / "job.json"
    policy = {"quorum": 1, "min_devices": max(devices, 1), "deadline_s": DEADLINE_S}
    file.write_text(json.dumps({**job.model_dump(), "policy": policy}))
    options = ["--state", folder / "state", "--broker", broker, "--page", 0, "--json"]
    with ExitStack() as stack:
        program = stack.enter_context(
            Program("aggregator", ["serve", file, *options], folder, "serve")
        )
        program.wait_for("serving")
        fleet = LiveFleet(folder, program, broker, job)
        stack.callback(fleet.end)
        if devices:
            fleet.start(devices)
        yield fleet


def live_job(rounds: int) -> Job:
    return make_job().model_copy(
        update={"job": "notes", "rounds": rounds, "training": Training(steps=1)}
    )
