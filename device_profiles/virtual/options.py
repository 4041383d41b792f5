"""From what is asked for to all that a replay of traces follows from, and back from its log."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from aggregator.config import PolicySettings, build_job
from aggregator.engine import Name
from aggregator.errors import ConfigError
from aggregator.probe_text import with_probe_text
from aggregator.rounds import Policy as RoundPolicy
from device_profiles.demo_text import write_demo_text
from device_profiles.errors import ReplayError
from device_profiles.fleet import merge_settings
from device_profiles.replay import DEMO_TRAINING, REFERENCE_PARAMETERS
from device_profiles.traces.format import Trace, header_line, read_traces, sample_lines
from device_profiles.traces.scenarios import find_scenario
from device_profiles.virtual.benches import AT_ONCE
from device_profiles.virtual.broker import allow_files
from device_profiles.virtual.fleet import cast, parse_fidelities
from device_profiles.virtual.pool import FILE as POOL_FILE
from device_profiles.virtual.pool import Pool, Says, find_pool, text_hashes
from device_profiles.virtual.run import EPOCH, LONGEST_S, Staging
from edge_client.model import BASE_TINY, find_model, is_of_hub, model_hash
from edge_client.policy.owner import Policy, read_policy
from protocol.errors import os_words
from protocol.messages import Job
from protocol.metrics import asked_for
from protocol.settings_file import read_settings

FILE, FORMAT = "run.json", 1
JOB = "replay"
ROUNDS = 3
LADDER = [2, 4, 8]


@dataclass(frozen=True, slots=True)
class Options:
    """What a replay of traces is asked for."""

    traces: str = ""
    """A trace, or a folder of them; empty: the scenario's."""
    scenario: str = ""
    devices: int = 0
    """0: as many as there are traces."""
    fidelity: str = ""
    seed: int = 0
    speed: float = 0.0
    """Virtual seconds a second; 0: as fast as it goes."""
    resolution_s: float = 1.0
    until_s: float = LONGEST_S
    job: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the job beside the usual ones."""
    policy: str = ""
    """File of what owners allow; empty: the scenario's, or nothing is held up."""
    data: tuple[str, ...] = ()
    """Text of the devices that train, one each in turn; none: the demo's."""
    pool: str = ""
    broker: str = ""
    memory_scale: float | None = None
    download_s: float = 60.0
    processes: int = AT_ONCE
    """Training processes that are kept."""
    engine: Name = "plain"
    """What trains and merges; of no effect on what comes of it."""


class RunRecord(BaseModel):
    """The contents of run.json: all that a replay follows from, to do it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    options: dict[str, Any]
    job: dict[str, Any]
    policy: dict[str, Any]
    owner: dict[str, Any]
    memory_scale: float
    model: str
    traces: dict[str, str]
    """Name → hash of its header and samples."""
    text: list[str]
    pool: str | None
    versions: dict[str, str]


def prepare(
    options: Options, folder: Path, cache: Path, say: Says, owner: Policy | None = None
) -> tuple[Staging, Pool | None, RunRecord]:
    """Find or make all that a replay needs, and write down what that was.

    `owner` is what owners allow, where that is known already.

    Raises:
        ReplayError, ConfigError, TraceError: something of it is wrong or missing; says what.
    """
    _check_times(options)
    allow_files(options.devices)
    traces, begins_h = _traces(options, say)
    owner = owner or _owner(options, folder)
    count = options.devices or len(traces)
    fidelities = parse_fidelities(options.fidelity, count)
    taking_part = count - fidelities.get("headless", 0)
    name, job, policy, rules = _job(options, taking_part)
    _check(job, fidelities, max(policy.min_devices, policy.quorum), taking_part)
    needs_model = bool(fidelities.get("train")) or (taking_part and not options.pool)
    model = _model(name, job) if needs_model else Path(name)
    text = _text(options, folder) if fidelities.get("train") else []
    pool = _pool(job, model, options, cache, say) if taking_part else None
    if pool is not None:
        _keep_pool(pool, folder)
    scale = options.memory_scale or max(1.0, REFERENCE_PARAMETERS / job.base.parameters)
    staging = Staging(
        job=job,
        policy=policy,
        parts=cast(traces, count, options.seed, fidelities),
        seed=options.seed,
        model=_name_anywhere(name, model),
        text=text,
        memory_scale=scale,
        owner=owner,
        epoch=EPOCH + timedelta(hours=begins_h),
        resolution_s=options.resolution_s,
        speed=options.speed,
        until_s=options.until_s,
        broker=options.broker,
        download_s=options.download_s,
        processes=options.processes,
    )
    record = RunRecord(
        format=FORMAT,
        options=_plain(replace(options, devices=count)),
        job=job.model_dump(mode="json"),
        policy=rules,
        owner=owner.model_dump(mode="json"),
        memory_scale=scale,
        model=name,
        traces={trace.name: trace_hash(trace) for trace in traces},
        text=text_hashes(text),
        pool=pool.sha256 if pool is not None else None,
        versions=versions(),
    )
    (folder / FILE).write_text(record.model_dump_json(indent=1) + "\n")
    return staging, pool, record


def again(
    run: Path, folder: Path, cache: Path, say: Says, engine: Name
) -> tuple[Staging, Pool | None, RunRecord, list[str]]:
    """Prepare an earlier run's replay once more; the last are differences that may change it.

    Raises:
        ReplayError: its log can't be read, or what it followed from is not there any more.
    """
    before = read_record(run)
    try:
        given = {"data": tuple(before.options["data"]), "engine": engine}
        options = Options(**{**before.options, **given})
        owner = Policy.model_validate(before.owner)
    except (KeyError, TypeError, ValidationError):
        raise ReplayError(f"{run / FILE} is damaged, or another version wrote it") from None
    if (run / "pool" / POOL_FILE).exists():
        options = replace(options, pool=str(run / "pool"))
    job = {**before.job, "policy": before.policy, "model": before.model}
    options = replace(options, job=job, memory_scale=before.memory_scale)
    staging, pool, now = prepare(options, folder, cache, say, owner)
    for what in ("traces", "text", "pool", "job"):
        if getattr(before, what) != getattr(now, what):
            raise ReplayError(
                f"{run} can't be replayed exactly: its {what} "
                f"{'have' if what == 'traces' else 'has'} changed since"
            )
    doubts = [
        f"{name}: {had} then, {now.versions.get(name, 'missing')} now"
        for name, had in before.versions.items()
        if now.versions.get(name) != had
    ]
    return staging, pool, now, doubts


def read_record(run: Path) -> RunRecord:
    """Read what a run followed from.

    Raises:
        ReplayError: it can't be read, or is another version's.
    """
    try:
        record = RunRecord.model_validate_json((run / FILE).read_bytes())
    except OSError as error:
        raise ReplayError(f"{run} holds no replay of traces ({os_words(error)})") from None
    except ValidationError:
        raise ReplayError(f"{run / FILE} is damaged, or another version wrote it") from None
    if record.format != FORMAT:
        raise ReplayError(f"{run / FILE} is of format {record.format}, this program of {FORMAT}")
    return record


def trace_hash(trace: Trace) -> str:
    """Return a hash of all that a trace says."""
    digest = hashlib.sha256()
    digest.update(header_line(trace.name, trace.profile, None, None).encode())
    for line in sample_lines(trace.samples):
        digest.update(line.encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what a result may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("tunefleet", "numpy", "paho-mqtt", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _check_times(options: Options) -> None:
    for name, value in (("resolution", options.resolution_s), ("until", options.until_s)):
        if not 0 < value < inf:
            raise ReplayError(f"--{name}: give a finite time above zero")


def _traces(options: Options, say: Says) -> tuple[Sequence[Trace], float]:
    """Return the traces, and the hour of the day at which they begin."""
    if options.scenario:
        scenario = find_scenario(options.scenario)
        if options.devices < 1:
            raise ReplayError(f"--scenario {options.scenario}: say how many with --devices")
        return scenario.traces(options.devices, options.seed), scenario.begins_h
    if options.traces:
        return read_traces(Path(options.traces), warn=say), 0.0
    raise ReplayError("name a trace, a folder of traces, or a --scenario")


def _owner(options: Options, folder: Path) -> Policy:
    """Return what owners allow: what a file says, or the scenario, or everything."""
    if options.policy:
        return read_policy(Path(options.policy))
    if options.scenario and (policy := find_scenario(options.scenario).policy):
        file = folder / "policy.toml"
        file.write_text(policy)
        return read_policy(file)
    return Policy()


def _usual(seed: int, taking_part: int) -> dict[str, Any]:
    return {
        "job": JOB,
        "model": "base-tiny",
        "seed": seed,
        "rounds": ROUNDS,
        "ladder": LADDER,
        "training": DEMO_TRAINING,
        "policy": {
            "min_devices": max(1, taking_part // 2),
            "quorum": max(1, taking_part // 4),
            "deadline_s": 3600.0,
            "keep_versions": 0,  # what each was worth is measured at the end
        },
    }


def _check(job: Job, fidelities: Mapping[Any, int], wanted: int, taking_part: int) -> None:
    if not taking_part:
        raise ReplayError(
            "all devices are headless, which send no update: have one at least train or be "
            "recorded (--fidelity recorded=N)"
        )
    if wanted > taking_part:
        raise ReplayError(
            f"the job's [policy] waits for {wanted} devices, and {taking_part} take part: lower "
            "min_devices and quorum"
        )
    if fidelities.get("recorded") and (asks := _asks_for_text(job)):
        raise ReplayError(
            f"{asks} asks devices what only those that train can tell: have all of them train "
            "(--fidelity train=N), or leave it out"
        )


def _asks_for_text(job: Job) -> str:
    """Return what of a job can be answered with text alone; empty: nothing."""
    if job.is_personal:
        return f"rule {job.rule!r}"
    if job.probe is not None:
        return "the job's [probe]"
    return f"weights {job.rule_settings['weights']!r}" if asked_for(job.rule_settings) else ""


def _job(options: Options, taking_part: int) -> tuple[str, Job, RoundPolicy, dict[str, Any]]:
    """Return the model's name, the job, how its rounds are run, and that as it is written down."""
    fields = merge_settings(_usual(options.seed, taking_part), dict(options.job))
    name = str(fields["model"])
    if "base" in fields:  # of an earlier run, whose model need not be described again
        del fields["model"]
    job, policy = build_job(fields, "the job")
    rules = PolicySettings.model_validate(fields.get("policy", {})).model_dump(mode="json")
    return name, job, policy, rules


def _pool(job: Job, model: Path, options: Options, cache: Path, say: Says) -> Pool:
    """Find the pool of a job: the same for every seed, so that it is made once."""
    if options.pool:
        return Pool(Path(options.pool), job)
    if options.data:
        return find_pool(job, model, [Path(path) for path in options.data], cache, say)
    with tempfile.TemporaryDirectory(prefix="tunefleet-text-") as folder:
        text = [Path(folder) / part.name for part in write_demo_text(Path(folder), seed=0)]
        return find_pool(job, model, text, cache, say)


def _model(name: str, job: Job) -> Path:
    folder = find_model(name)
    if model_hash(folder) != job.base.sha256:
        raise ReplayError(f"{folder} is another model than the job's base {job.base.name!r}")
    return folder


def _name_anywhere(name: str, folder: Path) -> str:
    """Return the name of a model that finds it from another folder, and on another machine."""
    return name if name == BASE_TINY or is_of_hub(name) else str(folder.absolute())


def _text(options: Options, folder: Path) -> list[Path]:
    if options.data:
        return [Path(path) for path in options.data]
    return [folder / "text" / p.name for p in write_demo_text(folder / "text", seed=options.seed)]


def _keep_pool(pool: Pool, folder: Path) -> None:
    """Copy a pool into the run's folder, which is to be enough to do it again."""
    if pool.folder.resolve() != (folder / "pool").resolve():
        shutil.copytree(pool.folder, folder / "pool")


def _plain(options: Options) -> dict[str, Any]:
    """Return what was asked for as JSON has it; files by where they are, whoever asks again."""
    found = {name: getattr(options, name) for name in Options.__slots__}
    for name in ("traces", "policy", "pool"):
        found[name] = str(Path(found[name]).resolve()) if found[name] else ""
    found["data"] = [str(Path(path).resolve()) for path in options.data]
    plain: dict[str, Any] = json.loads(json.dumps({**found, "job": dict(options.job)}))
    return plain


def read_fields(job_file: Path | None, *more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a job file, and what is said beside it.

    Raises:
        ConfigError: it can't be read.
    """
    fields: dict[str, Any] = {}
    if job_file is not None:
        read = read_settings(job_file, "job file", ConfigError)
        fields = with_probe_text(read, job_file.parent, str(job_file))
    for settings in more:
        fields = merge_settings(fields, dict(settings))
    return fields


def parse_speed(text: str) -> float:
    """Read a speed: virtual seconds a second, or `max`, which is 0.

    Raises:
        ReplayError: it is neither.
    """
    if text == "max":
        return 0.0
    try:
        speed = float(text)
    except ValueError:
        speed = -1.0
    if not 0 < speed < inf:
        raise ReplayError(f"--speed {text!r}: give virtual seconds a second, say 3600, or max")
    return speed
