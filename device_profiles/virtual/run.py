"""Replay traces: a broker, the real aggregator, and virtual devices, until the job is finished."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from aggregator.config import PolicySettings
from aggregator.engine import IN_PROCESS, Engine
from aggregator.merging import merges_by_module
from aggregator.rounds import Policy as RoundPolicy
from device_profiles.replay import clear_broker, leaving_broker
from device_profiles.virtual.benches import AT_ONCE, Seat, Workplace, workplace
from device_profiles.virtual.broker import RunningBroker, running_broker
from device_profiles.virtual.device import Stage, VirtualDevice, for_replay
from device_profiles.virtual.drive import Drive
from device_profiles.virtual.equipment import MakeLearner
from device_profiles.virtual.fleet import Part
from device_profiles.virtual.learning import Recorded, ReplayLearning
from device_profiles.virtual.losses import BASE, Losses, version_losses
from device_profiles.virtual.pool import Pool
from device_profiles.virtual.result import read_result
from device_profiles.virtual.schedule import Schedule
from device_profiles.virtual.serving import PacedAggregator
from device_profiles.virtual.text import CarriedText, text_of
from device_profiles.virtual.training import BenchLearner, Submit
from edge_client.config import Settings
from edge_client.learner import StepDown
from edge_client.plan import Plan
from edge_client.policy.owner import Policy
from edge_client.trust import FILE as TRUST_FILE
from protocol.loop_link import Loop
from protocol.messages import Job
from protocol.signing import SigningKey

EPOCH = datetime(2026, 1, 5)
"""A Monday, midnight."""
LONGEST_S = 30 * 24 * 3600.0
RESULT = "result.json"
SHARED = "devices"
"""Folder of what devices that train nothing have on disk: the aggregator's key."""
OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Staging:
    """All that a replay follows from, but the traces' own bytes."""

    job: Job
    policy: RoundPolicy
    parts: Sequence[Part]
    seed: int
    model: str
    """Name of the base model, by which who trains finds it; see `find_model`."""
    text: Sequence[Path]
    """Text of the devices that train, one part each in turn."""
    memory_scale: float
    owner: Policy = field(default_factory=Policy)
    """What devices' owners allow."""
    epoch: datetime = EPOCH
    """Local time at the replay's start."""
    resolution_s: float = 1.0
    speed: float = 0.0
    """Virtual seconds a second; 0: as fast as it goes."""
    until_s: float = LONGEST_S
    broker: str = ""
    download_s: float = 60.0
    processes: int = AT_ONCE
    """Training processes that are kept here; it changes nothing but how long a replay takes."""


@dataclass(slots=True)
class Watched:
    """What a replay has seen, for whoever measures it."""

    broker: RunningBroker | None = None
    aggregator_pid: int | None = None
    drive: Drive | None = None
    devices: Sequence[VirtualDevice] = ()

    @property
    def bytes(self) -> int:
        """What has gone through all devices' links so far, both ways."""
        return sum(d.link.bytes_sent + d.link.bytes_received for d in self.devices)


def replay_traces(
    staging: Staging,
    folder: Path,
    pool: Pool | None,
    on_event: OnEvent,
    watched: Watched | None = None,
    engine: Engine = IN_PROCESS,
) -> dict[str, Any]:
    """Run a replay to the end of its job; return its result, which is also in the folder.

    `engine` trains for the devices that really do, and merges.

    Raises:
        ReplayError: it can't be carried out, or comes to no end; what there is stays.
        EngineError: the engine can't do its part.
    """
    watched, started = watched or Watched(), time.monotonic()
    events = _Log(folder / "events.jsonl", on_event)
    with workplace(engine, staging.processes) as place:
        with ExitStack() as stack:
            stack.callback(events.close)
            drive = _set_up(stack, staging, folder, pool, events, watched, place)
            ended = _run(drive, watched.devices, staging)
            traffic = {
                "bytes_up": sum(d.link.bytes_sent for d in watched.devices),
                "bytes_down": sum(d.link.bytes_received for d in watched.devices),
            }
        rounds = _with_history(read_result(folder / "aggregator"), events)
        rounds = _with_losses(rounds, staging, folder, place)
    result = {
        **rounds,
        "ended": ended,
        "virtual_s": drive.now_s,
        "instants": drive.instants,
        "counts": dict(sorted(events.counts.items())),
        **traffic,
        "wall_s": round(time.monotonic() - started, 2),
    }
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _set_up(
    stack: ExitStack,
    staging: Staging,
    folder: Path,
    pool: Pool | None,
    events: _Log,
    watched: Watched,
    place: Workplace,
) -> Drive:
    """Start the broker and the aggregator, make the devices; all end with the stack."""
    key = SigningKey.load_or_create(folder / "aggregator.key")
    (folder / SHARED).mkdir(parents=True)
    (folder / SHARED / TRUST_FILE).write_text(key.public)
    job_file = folder / "job.json"
    fields = {**staging.job.model_dump(mode="json"), "policy": PolicySettings.of(staging.policy)}
    job_file.write_text(json.dumps(fields, indent=1))
    epoch_s = (staging.epoch - datetime(1970, 1, 1)).total_seconds()
    if staging.broker:
        names = [part.name for part in staging.parts]
        clear_broker(staging.broker, staging.job.job, names)
        stack.enter_context(leaving_broker(staging.broker, staging.job.job, names))
    broker = stack.enter_context(
        running_broker(staging.broker, folder / "broker", len(staging.parts))
    )
    loop, schedule = Loop(), Schedule()
    stack.callback(loop.close)
    merging = place.engine if merges_by_module(staging.job) else IN_PROCESS
    aggregator = PacedAggregator(
        loop, folder, job_file, broker.address, epoch_s, events.of_aggregator, merging
    )
    stack.callback(aggregator.stop)
    watched.broker, watched.aggregator_pid = broker, aggregator.pid
    stage = Stage(
        loop,
        schedule,
        staging.job,
        pool.calibration if pool is not None else None,
        staging.epoch,
        events.take,
    )
    devices = [
        _device(stage, staging, index, part, folder, broker, pool, place.submit)
        for index, part in enumerate(staging.parts)
    ]
    stack.callback(_close_all, devices)
    drive = Drive(
        loop,
        schedule,
        aggregator,
        devices,
        epoch_s=epoch_s,
        resolution_s=staging.resolution_s,
        speed=staging.speed,
    )
    events.now = lambda: drive.now_s
    watched.drive, watched.devices = drive, devices
    return drive


def _run(drive: Drive, devices: Sequence[VirtualDevice], staging: Staging) -> str:
    """Go through virtual time until the job is finished, and who trains has kept its result."""
    training = [device for device in devices if device.fidelity == "train"]
    while drive.now_s < staging.until_s:
        if drive.stands["state"] == "finished" and all(
            d.has_finished or d.is_over or not d.is_online for d in training
        ):
            return "finished"
        if not drive.instant():
            return "nothing more can happen"
    return "time is up"


def _device(
    stage: Stage,
    staging: Staging,
    index: int,
    part: Part,
    folder: Path,
    broker: RunningBroker,
    pool: Pool | None,
    submit: Submit,
) -> VirtualDevice:
    state, text = folder / SHARED, None
    if part.fidelity == "train":
        text = text_of(staging.text, index)
        state = state / part.name
        state.mkdir()
        (state / TRUST_FILE).write_bytes((folder / SHARED / TRUST_FILE).read_bytes())
    settings = Settings(
        name=part.name,
        broker=broker.address,
        data=(text,) if text is not None else (),
        state=state,
        cache=folder,
        profile=part.profile,
        job=stage.job.job,
        memory_scale=staging.memory_scale,
        threads=1,
        seed=staging.seed,
        exit_when_done=True,
        policy=for_replay(staging.owner),
        download_s=staging.download_s,
    )
    learner = _learner(submit, settings, staging.model, text, pool)
    return VirtualDevice(stage, index, settings, part.trace, part.offset_s, part.fidelity, learner)


def _learner(
    submit: Submit, settings: Settings, model: str, text: Path | None, pool: Pool | None
) -> MakeLearner:
    """Return what makes a device's learner: it trains where it has text."""

    def make(job: Job, plan: Plan, step_down: StepDown) -> ReplayLearning:
        if text is not None:
            carried = CarriedText(text)
            seat = Seat(job, settings.name, model, carried, settings.seed, plan)
            return BenchLearner(submit, seat, step_down)
        assert pool is not None, "there is one where devices are recorded"
        return Recorded(job, settings.name, pool, plan)

    return make


def _close_all(devices: Sequence[VirtualDevice]) -> None:
    for device in devices:
        device.close()


def _with_history(result: dict[str, Any], events: _Log) -> dict[str, Any]:
    """Add when each round was merged, and the mean loss that who trains began it with."""
    for each in result["rounds"]:
        losses = events.losses.get(each["round"], {})
        each["merged_s"] = events.merged_s.get(each["round"])
        each["loss"] = fmean(losses.values()) if losses else None
    return result


def _with_losses(
    result: dict[str, Any], staging: Staging, folder: Path, place: Workplace
) -> dict[str, Any]:
    """Add what the base and each version are worth on the text of those that train.

    Of a job with personal adapters nothing is: its devices use others than the common version.
    """
    texts = {
        part.name: text_of(staging.text, index)
        for index, part in enumerate(staging.parts)
        if part.fidelity == "train"
    }
    losses: Losses = {}
    if texts and not staging.job.is_personal:
        versions = [each["version"] for each in result["rounds"] if each["version"]]
        state = folder / "aggregator"
        losses = version_losses(
            place, staging.job, staging.model, texts, staging.seed, state, versions
        )
    for each in result["rounds"]:
        each["version_losses"] = found = losses.get(each["version"])
        each["version_loss"] = fmean(found.values()) if found else None
    base = losses.get(BASE)
    return {**result, "base_loss": fmean(base.values()) if base else None}


class _Log:
    """Write every event to a file, in virtual time, and count them; `on_event` hears each."""

    def __init__(self, path: Path, on_event: OnEvent) -> None:
        self.counts: Counter[str] = Counter()
        self.losses: dict[int, dict[str, float]] = {}
        """Round → device that really trains → its held-out loss at the round's start."""
        self.merged_s: dict[int, float] = {}
        self.now: Callable[[], float] = lambda: 0.0
        self._file = path.open("w")
        self._on_event = on_event

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event of a device."""
        kind = str(event["event"])
        self.counts[kind] += 1
        if kind == "evaluated" and str(event["device"]).startswith("train-"):
            self.losses.setdefault(event["round"], {})[event["device"]] = event["loss"]
        elif kind == "aggregator.merged":
            self.merged_s[event["round"]] = event["time"]
        self._file.write(json.dumps(event, default=str) + "\n")
        self._on_event(event)

    def of_aggregator(self, event: Mapping[str, Any]) -> None:
        """Take an event of the aggregator, whose own name for a device stays."""
        self.take({**event, "event": f"aggregator.{event['event']}", "time": self.now()})

    def close(self) -> None:
        self._file.close()
