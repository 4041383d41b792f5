"""A fleet to replay: which devices, which text, which job. In TOML:

    model = "base-tiny"
    rule = "anchored"
    rounds = 6

    [training]
    steps = 12

    [[device]]
    name = "kitchen"
    profile = "raspberry-pi-4b-2gb"     # a recorded profile, or a .toml of one
    data = ["texts/kitchen"]            # files or folders, from the fleet file's folder
    backend = "onnx"                    # what it trains with: torch (default), onnx or auto

Everything but `model` and `device` is a setting of the job; see docs/job.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from aggregator.errors import ConfigError
from aggregator.probe_text import with_probe_text
from device_profiles.demo_text import write_demo_text
from device_profiles.errors import FleetError
from device_profiles.schema import DeviceProfile, load_profile
from protocol.settings_file import read_settings
from protocol.topics import NAME

DEMO_DEVICES = (
    ("pi-3b-plus", "raspberry-pi-3b-plus-1gb", "markup"),
    ("pi-4b-2gb", "raspberry-pi-4b-2gb", "email"),
    ("pi-4b-4gb", "raspberry-pi-4b-4gb", "asyncio"),
    ("pi-5", "raspberry-pi-5-8gb", "multiprocessing"),
    ("jetson-nano", "jetson-nano-4gb", "encodings"),
    ("laptop", "laptop-16gb", "topics"),
)
"""Name, profile and part of the standard library of each device of the demo."""
DEFAULT_MODEL = "base-tiny"
Backend = Literal["torch", "onnx", "auto"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """One device of a fleet."""

    name: str
    profile: DeviceProfile
    profile_source: str
    """What `--profile` takes: a bundled name or a path."""
    data: tuple[Path, ...]
    text: str
    """What its text is, in words."""
    backend: Backend = "torch"
    """What it trains with; auto: what fits best and is fastest."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices, a base model, and settings of the job."""

    model: str
    devices: tuple[FleetDevice, ...]
    job: dict[str, Any] = field(default_factory=dict)


def demo_fleet() -> Fleet:
    """Return the demo's six devices, which have no text yet."""
    devices = tuple(
        FleetDevice(name, load_profile(profile), profile, (), part)
        for name, profile, part in DEMO_DEVICES
    )
    return Fleet(DEFAULT_MODEL, devices)


def with_backend(fleet: Fleet, backend: Backend) -> Fleet:
    """Have all devices train with one backend."""
    devices = tuple(replace(device, backend=backend) for device in fleet.devices)
    return replace(fleet, devices=devices)


def with_probe(fleet: Fleet) -> Fleet:
    """Give a fleet's job a public text of all the demo's kinds to predict, if it has none."""
    text = Path(__file__).with_name("probe.txt").read_text(encoding="utf-8")
    return replace(fleet, job=merge_settings({"probe": {"text": text}}, fleet.job))


def with_demo_text(fleet: Fleet, folder: Path, *, seed: int) -> Fleet:
    """Give each device of the demo a part of the running Python's standard library, in a folder.

    Raises:
        DemoTextError: the library lacks a part.
    """
    titles = {part.name: part.title for part in write_demo_text(folder, seed=seed)}
    devices = tuple(
        replace(device, data=(folder / device.text,), text=titles[device.text])
        for device in fleet.devices
    )
    return replace(fleet, devices=devices)


def read_fleet(path: Path) -> Fleet:
    """Read a fleet file.

    Raises:
        FleetError: it is not there, not TOML, or a device lacks something.
        ProfileError: a device names a profile that is not there.
    """
    try:
        fields = with_probe_text(
            read_settings(path, "fleet file", ConfigError), path.parent, str(path)
        )
    except ConfigError as error:
        raise FleetError(str(error)) from None
    rows = fields.pop("device", [])
    if not isinstance(rows, list) or not rows:
        raise FleetError(f"{path} has no [[device]]; a fleet needs at least one")
    devices = tuple(_device(path, number, row) for number, row in enumerate(rows, start=1))
    names = [device.name for device in devices]
    if len(set(names)) != len(names):
        raise FleetError(f"{path}: two devices have one name")
    model = str(fields.pop("model", DEFAULT_MODEL))
    local = path.parent / model
    return Fleet(str(local) if local.is_dir() else model, devices, fields)


PUBLISHED = ("fedavg", "hetlora", "flexlora", "flora", "segment")
"""Rules of papers in which devices cut the shared adapter to their own rank."""


def for_rule(job: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Fill in what a published rule goes with, and say what that is; "" where it is nothing.

    It is: the remainder dropped, the top directions trained, one learning rate for all. What the
    job says goes before it, and so does what does not go together with it.
    """
    rule, training = job.get("rule"), job.get("training")
    if rule not in PUBLISHED:
        return job, ""
    filled: dict[str, Any] = {}
    frozen = job.get("layers") == "fit" or job.get("directions") == "rotating"
    if not frozen:
        filled |= {"remainder": "dropped", "directions": "top"}
    filled = {name: value for name, value in filled.items() if name not in job}
    said = [f'{name} = "{value}"' for name, value in filled.items()]
    if not isinstance(training, dict) or "learning_rate_by_rank" not in training:
        filled["training"] = {"learning_rate_by_rank": False}
        said.append("training.learning_rate_by_rank = false")
    note = f"{rule} as published: {', '.join(said)}; --set changes them" if said else ""
    return merge_settings(filled, job), note


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Read `a.b=value` settings; values are JSON, or text where they are not.

    Raises:
        FleetError: a setting has no `=`.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise FleetError(f"--set {setting!r}: write name=value, say training.steps=20")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        found = merge_settings(found, value)
    return found


def merge_settings(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of `over` on top."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = merge_settings(below, value)
        merged[name] = value
    return merged


def _device(path: Path, number: int, row: Any) -> FleetDevice:
    where = f"{path}: device {number}"
    if not isinstance(row, dict) or not {"name", "profile", "data"} <= row.keys():
        raise FleetError(f"{where} needs a name, a profile and data")
    name, data = row["name"], row["data"]
    if unknown := row.keys() - {"name", "profile", "data", "text", "backend"}:
        raise FleetError(f"{where}: a device has no {sorted(unknown)[0]!r}")
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or name == "aggregator":
        raise FleetError(
            f"{where}: {name!r} can't be a device's name; use 1 to 63 small letters, digits and "
            "inner dashes, and not 'aggregator'"
        )
    backend = row.get("backend", "torch")
    if backend not in BACKENDS:
        raise FleetError(
            f"{where} ({name}): backend must be {', '.join(BACKENDS)}, not {backend!r}"
        )
    data = [data] if isinstance(data, str) else data
    if not isinstance(data, list) or not data:
        raise FleetError(f"{where} ({name}): data is a path or a list of paths")
    paths = tuple((path.parent / str(item)).resolve() for item in data)
    for one in paths:
        if not one.exists():
            raise FleetError(f"{where} ({name}): there is no {one}")
    profile = str(row["profile"])
    if profile.endswith(".toml"):
        profile = str((path.parent / profile).resolve())
    text = str(row.get("text", ", ".join(one.name for one in paths)))
    return FleetDevice(name, load_profile(profile), profile, paths, text, backend)
