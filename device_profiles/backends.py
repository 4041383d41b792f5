"""What a fleet's devices train with: torch, ONNX Runtime, or both side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

from device_profiles.errors import TooLarge
from device_profiles.fleet import Fleet, FleetDevice

Ask = Callable[[list[str]], str]


def export_onnx(fleet: Fleet, out: Path, ask: Ask) -> Path | None:
    """Make what devices train from with ONNX Runtime, once for all, where one may train with it.

    Raises:
        ReplayError: it can't be made here; says why.
    """
    if all(device.backend == "torch" for device in fleet.devices):
        return None
    folder = out / "onnx"
    ask(["export-onnx", fleet.model, "--out", str(folder)])
    return folder


def plan_arguments(device: FleetDevice, scale: float, onnx: Path | None) -> list[str]:
    """Return the options by which an `edge-client` command plans as this device."""
    arguments = ["--profile", device.profile_source, "--backend", device.backend]
    if device.backend != "torch":
        assert onnx is not None, "it is exported for a device that may train with it"
        arguments += ["--onnx", str(onnx)]
    return [*arguments, "--memory-scale", str(scale), "--threads", "1"]


def mix(fleet: Fleet, fits: Callable[[FleetDevice], bool]) -> Fleet:
    """Have half of the devices train with onnx, the rest with torch.

    Those with least memory that a plan with onnx `fits`: it has the smaller floor, but computes in
    float32 and keeps all activations, so the least of all may have room for torch alone.
    """
    chosen: list[str] = []
    for device in sorted(fleet.devices, key=lambda d: d.profile.memory.total_mib or inf):
        if len(chosen) < len(fleet.devices) // 2 and fits(replace(device, backend="onnx")):
            chosen.append(device.name)
    devices = (replace(d, backend="onnx" if d.name in chosen else "torch") for d in fleet.devices)
    return replace(fleet, devices=tuple(devices))


def mixed(fleet: Fleet, job: Path, scale: float, onnx: Path | None, ask: Ask) -> Fleet:
    """Return the fleet with both backends; planning says whether onnx fits a device.

    `job` is the file of the fleet's job.

    Raises:
        ReplayError: planning failed for another reason.
    """

    def fits(device: FleetDevice) -> bool:
        try:
            ask(["plan", "--job", str(job), *plan_arguments(device, scale, onnx)])
        except TooLarge:
            return False
        return True

    return mix(fleet, fits)
