"""Replay a fleet through the real stack: real processes, a real broker, real training.

fleet → job file → aggregator (and its broker) → a device process each → export → summary
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from aggregator.config import check_settings
from aggregator.errors import JobInUse
from aggregator.withdraw import withdraw
from device_profiles.backends import export_onnx, mixed, plan_arguments
from device_profiles.errors import ReplayError, TooLarge
from device_profiles.fleet import Fleet, FleetDevice, merge_settings
from device_profiles.history import History
from device_profiles.measuring import Measured, measure
from device_profiles.processes import Event, Processes
from device_profiles.report import write_report
from protocol.cli import EXIT_TOO_LARGE
from protocol.errors import TransportError
from protocol.lifeline import lifeline, tied_environment
from protocol.transport import BrokerAddress

REFERENCE_PARAMETERS = 135e6
"""SmolLM2-135M: what the recorded devices' memory is scaled to stand for."""
JOB = "replay"
TIMEOUT_S = 7 * 24 * 3600.0
DEMO_TRAINING = {"steps": 6, "tokens_per_step": 256, "max_tokens": 256, "learning_rate": 4e-3}


@dataclass(frozen=True, slots=True)
class Options:
    """How to replay."""

    out: Path
    """Folder of this run."""
    seed: int = 0
    broker: str = ""
    """mqtt://host:port; empty: the embedded one."""
    memory_scale: float | None = None
    """None: 135 M / the base's parameters, at least 1."""
    compare_alone: bool = True
    mixed: bool = False
    """Have half of the devices train with ONNX Runtime; see `device_profiles.backends.mix`."""


OnEvent = Callable[[Event], None]


def replay(fleet: Fleet, options: Options, on_event: OnEvent) -> dict[str, Any]:
    """Run a fleet's job to its end; return the summary, which is also in the run's folder.

    Raises:
        ReplayError: a process failed; says which and what it said.
    """
    started = time.monotonic()
    out = options.out
    onnx = export_onnx(fleet, out, _ask)
    base = _describe(fleet.model, out)
    (out / "logs").mkdir()
    scale = options.memory_scale or max(1.0, REFERENCE_PARAMETERS / base["parameters"])
    on_event(
        {
            "event": "scale",
            "memory_scale": scale,
            "parameters": base["parameters"],
            "model": base["name"],
        }
    )
    job = job_fields(fleet, options.seed)
    written = {**job, "model": str(out / "model.json")}
    (out / "job.json").write_text(json.dumps(written, indent=1))
    if options.mixed:
        fleet = mixed(fleet, out / "job.json", scale, onnx, _ask)
        onnx_devices = [device.name for device in fleet.devices if device.backend == "onnx"]
        on_event({"event": "mixed", "onnx": onnx_devices})
    history = History()
    names = [device.name for device in fleet.devices]
    with (
        leaving_broker(options.broker, job["job"], names),
        Processes(out / "events.jsonl", out / "logs") as processes,
    ):
        _start_aggregator(processes, options, out)
        for event in processes.events(TIMEOUT_S):
            if event["event"] == "exit":
                if event["process"] not in history.finished:
                    raise ReplayError(f"{event['process']} was stopped before the job was done")
                continue
            history.take(event)
            on_event(event)
            if event["event"] == "rejected" and (why := history.all_refused(names)):
                raise ReplayError(why)
            if event["event"] == "serving":
                for device in fleet.devices:
                    arguments = _device_arguments(device, fleet, options, event, scale, onnx)
                    processes.start(device.name, "edge_client", arguments)
            if len(history.finished) == len(fleet.devices):
                break
    max_tokens = history.serving["training"]["max_tokens"]
    own = [name for name in names if history.finished[name]["personal"] is not None]
    measured = measure(fleet, options, own, max_tokens, on_event, _ask)
    summary = _summary(fleet, options, base, scale, history, measured)
    summary["across"] = measured.across
    summary["wall_s"] = round(time.monotonic() - started, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    write_report(summary, out / "report.html")
    return summary


def job_fields(fleet: Fleet, seed: int) -> dict[str, Any]:
    """Return the fields of a replay's job file."""
    everybody = len(fleet.devices)
    usual = {
        "job": JOB,
        "model": fleet.model,
        "seed": seed,
        "training": DEMO_TRAINING,
        "policy": {"min_devices": everybody, "quorum": everybody},
    }
    return merge_settings(usual, fleet.job)


def check_replay(fleet: Fleet, seed: int, broker: str, where: str) -> None:
    """Refuse a replay that can't be run, and make its broker ready, before anything is made of it.

    `where` says where its settings are from.

    Raises:
        ConfigError: a setting of its job is wrong.
        ReplayError: it waits for more devices than there are, or another one uses the broker.
        TransportError: the broker can't be reached, or refuses.
    """
    fields, everybody = job_fields(fleet, seed), len(fleet.devices)
    _, policy = check_settings(fields, where)
    if max(policy.quorum, policy.min_devices) > everybody:
        raise ReplayError(
            f"{where}: [policy] waits for more devices than the fleet's {everybody}: lower quorum "
            f"({policy.quorum}) and min_devices ({policy.min_devices})"
        )
    if broker:
        clear_broker(broker, fields["job"], [device.name for device in fleet.devices])


def clear_broker(broker: str, job: str, devices: Sequence[str]) -> None:
    """Take the replay before off a broker of one's own: every replay's job has the same name.

    That name is part of the draws of directions and cohort, so that equal seeds give equal runs.

    Raises:
        TransportError: the broker can't be reached, or refuses.
        ReplayError: a device of the job is online: another replay uses the broker.
    """
    try:
        withdraw(BrokerAddress.parse(broker), job, devices=devices)
    except JobInUse as error:
        raise ReplayError(
            f"another replay is running on {broker} (its device {error.devices[0]!r} is online); "
            "wait for its end, or name another broker with --broker"
        ) from None


@contextmanager
def leaving_broker(broker: str, job: str, devices: Sequence[str]) -> Iterator[None]:
    """Take this replay off a broker of one's own when the block ends."""
    try:
        yield
    finally:
        if broker:
            with suppress(TransportError):  # the result, or what went wrong before, counts for more
                withdraw(BrokerAddress.parse(broker), job, devices=devices, force=True)


@contextmanager
def run_folder(root: Path) -> Iterator[Path]:
    """Make `root/<time>` for a run; where the block fails and has left nothing in it, it goes.

    Raises:
        ReplayError: the folder can't be written to.
    """
    folder = new_run_folder(root)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # there is something in it
            folder.rmdir()
        raise


def new_run_folder(root: Path) -> Path:
    """Make and return `root/<time>`.

    Raises:
        ReplayError: the folder can't be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        stem = time.strftime("%Y%m%d-%H%M%S")
        number = 0
        while True:
            out = root / (f"{stem}-{number}" if number else stem)
            try:
                out.mkdir()
                break
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ReplayError(f"can't write to {root}: {error}; name another with --out") from None
    return out


def name_latest(out: Path) -> Path:
    """Let `latest` beside a run that has ended well name it; return that link.

    Where it can't be made (a folder of that name, no links) the run has ended well all the same,
    and goes by its own name.
    """
    link = out.parent / f".latest-{os.getpid()}"
    try:
        link.symlink_to(out.name)
        return link.replace(out.parent / "latest")
    except OSError:
        link.unlink(missing_ok=True)
        return out


# -- before ----------------------------------------------------------------------------------------


def _describe(model: str, out: Path) -> dict[str, Any]:
    text = _ask(["describe", model])
    (out / "model.json").write_text(text)
    described: dict[str, Any] = json.loads(text)
    return described


def _ask(arguments: list[str]) -> str:
    """Return what an `edge-client` command prints.

    Raises:
        TooLarge: it says that no plan fits.
        ReplayError: it failed otherwise.
    """
    command = [sys.executable, "-m", "edge_client", *arguments]
    # Two are asked at once: more threads would spin and wait for each other.
    environment = tied_environment(OMP_NUM_THREADS="1")
    answer = subprocess.run(
        command, stdin=lifeline(), capture_output=True, text=True, check=False, env=environment
    )
    if answer.returncode != 0:
        why = answer.stderr.strip().splitlines() or [f"{arguments[0]} failed"]
        kind = TooLarge if answer.returncode == EXIT_TOO_LARGE else ReplayError
        raise kind(why[-1].removeprefix("error: "))
    return answer.stdout


def _start_aggregator(processes: Processes, options: Options, out: Path) -> None:
    where = ["--broker", options.broker] if options.broker else ["--port", "0"]
    arguments = ["serve", out / "job.json", "--state", out / "aggregator", "--json", *where]
    arguments += ["--key", out / "aggregator.key"]  # a replay leaves the user's own one alone
    arguments.append("--no-wait")
    processes.start("aggregator", "aggregator", arguments)


def _device_arguments(
    device: FleetDevice,
    fleet: Fleet,
    options: Options,
    serving: Event,
    scale: float,
    onnx: Path | None,
) -> list[object]:
    arguments: list[object] = ["run", "--json", "--exit-when-done", "--no-wait"]
    arguments += ["--name", device.name]
    arguments += ["--job", serving["job"]]
    arguments += ["--policy", os.devnull]  # a replay goes by recorded devices, not by this one
    for path in device.data:
        arguments += ["--data", path]
    arguments += [
        "--broker",
        serving["broker"],
        "--model",
        fleet.model,
    ]
    arguments += plan_arguments(device, scale, onnx)
    arguments += ["--state", options.out / "devices" / device.name, "--seed", options.seed]
    return [*arguments, "--compare-alone"] if options.compare_alone else arguments


# -- after -----------------------------------------------------------------------------------------


def _summary(
    fleet: Fleet,
    options: Options,
    base: dict[str, Any],
    scale: float,
    history: History,
    measured: Measured,
) -> dict[str, Any]:
    served = history.serving
    devices = [_device_summary(device, history, measured) for device in fleet.devices]
    kinds = ("base", "local", "merged", "merged_on_device")
    loss = {kind: _mean([d["loss"].get(kind) for d in devices]) for kind in kinds}
    if measured.personal:  # who has none goes on with the common one
        known = [d["loss"].get("personal", d["loss"]["merged"]) for d in devices]
        loss["personal"] = _mean(known)
    return {
        "rule": served["rule"],
        "seed": options.seed,
        "rounds": served["rounds"],
        "wall_s": None,
        "base_model": base["name"],
        "base_parameters": base["parameters"],
        "memory_scale": scale,
        "ladder": served["ladder"],
        "rank_max": max(served["ladder"]),
        "remainder": served["remainder"],
        "directions": served["directions"],
        "broker": options.broker or "embedded",
        "loss": loss,
        "devices": devices,
        "history": history.rounds(),
    }


def _device_summary(device: FleetDevice, history: History, measured: Measured) -> dict[str, Any]:
    end, plan = history.finished[device.name], history.plans[device.name]
    same = ("rank_start", "rank_end", "held_rank", "floor_mib", "predicted_mib", "peak_mib")
    counts = ("bytes_up", "bytes_down", "tokens")
    loss = {**end["loss"], "merged": measured.merged[device.name]}
    if device.name in measured.personal:
        # What it says of its own adapter is measured again, through PEFT.
        loss["merged_on_device"] = loss.pop("common")
        loss["personal"] = measured.personal[device.name]
    return {
        "name": device.name,
        "profile": device.profile.name,
        "title": device.profile.title,
        "text": device.text,
        "backend": plan["backend"],
        "plan": plan["plan"],
        "budget_mib": plan["budget_mib"],
        **{key: end[key] for key in (*same, *counts)},
        "loss": loss,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
