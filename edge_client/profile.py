"""Measure the device: the first step, from which plan, data and training follow.

On Linux nearly everything comes from /proc, /sys and /dev under one root, so that a recorded tree
gives the profile of the device that it was recorded on; the live device's storage, NetworkManager,
NVIDIA's driver and Python are asked too. Elsewhere psutil answers. It takes milliseconds and
imports no framework.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

from device_profiles.schema import CoreGroup, DeviceProfile, Memory, Power
from edge_client.profile_accelerators import apple_accelerators, read_accelerators
from edge_client.profile_cpu import (
    board_in_cpuinfo,
    read_architecture,
    read_cores,
    read_cpuinfo,
    read_features,
)
from edge_client.profile_linux import (
    BYTES_PER_MIB,
    read_board,
    read_memory,
    read_power,
    read_temperature_c,
    read_throttled,
)
from edge_client.profile_network import read_link
from edge_client.profile_runtimes import execution_providers

NATIVE_BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
NETWORK_ANSWER_S = 0.2
UNKNOWN_DEVICE = "unknown device"


def measure_profile(root: Path = Path("/"), *, name: str | None = None) -> DeviceProfile:
    """Measure this device, or the one whose /proc, /sys and /dev were recorded under `root`.

    `name`, by default the board's or machine's model, becomes a slug. What cannot be read is
    `None`; no unreadable or odd file makes it fail. What no file tells (storage, the running
    kernel's architecture, metering, installed runtimes) is asked only where `root` is "/".
    """
    live = root.resolve() == Path("/")
    if live and platform.system() != "Linux":
        return _measure_elsewhere(name)
    cpu = read_cpuinfo(root)
    architecture = (platform.machine() if live else "") or read_architecture(cpu)
    board = read_board(root) or board_in_cpuinfo(cpu) or UNKNOWN_DEVICE
    return DeviceProfile(
        name=slug(name or board),
        title=board,
        board_or_model=board,
        architecture=architecture,
        cpu_features=read_features(cpu, architecture),
        cores=read_cores(root, cpu),
        memory=read_memory(root),
        storage_free_mib=_storage_free_mib() if live else None,
        accelerators=read_accelerators(root, ask=live),
        execution_providers=execution_providers() if live else None,
        power=read_power(root),
        link=read_link(root, ask_s=NETWORK_ANSWER_S if live else 0.0),
        temperature_c=read_temperature_c(root),
        throttled=read_throttled(root),
        sources=("measured by the device's own profiler from /proc, /sys and /dev",),
    )


def native_bf16(profile: DeviceProfile) -> bool:
    """Say whether the CPU computes bf16 itself; else keeping weights in it saves memory only."""
    return not NATIVE_BF16_FEATURES.isdisjoint(profile.cpu_features)


def slug(title: str) -> str:
    """Turn a model's name into a profile's: lower case, digits and hyphens, at most 64 long."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower())[:64].strip("-") or "unknown-device"


def _storage_free_mib() -> int | None:
    """Return the free space (MiB) where this user's files are, state and caches among them."""
    try:
        return shutil.disk_usage(Path.home()).free // BYTES_PER_MIB
    except (OSError, RuntimeError):  # no home, or it is not there
        return None


def _measure_elsewhere(name: str | None) -> DeviceProfile:
    """Measure macOS, Windows and the BSDs with what psutil and platform know."""
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    count = psutil.cpu_count(logical=False) or psutil.cpu_count() or 0
    machine = platform.machine() or "unknown"
    kind = platform.processor() or machine
    system = platform.system()
    board = f"{system or 'unknown system'} {machine}"
    apple = system == "Darwin" and machine == "arm64"
    # Every 64-bit ARM has NEON; what else a processor has, these systems do not say in a file.
    features = ("neon",) if machine.lower() in ("arm64", "aarch64") else ()
    return DeviceProfile(
        name=slug(name or board),
        title=board,
        board_or_model=board,
        architecture=machine,
        cpu_features=features,
        cores=(CoreGroup(kind=kind[:120], count=count),) if count else (),
        memory=Memory(
            total_mib=int(memory.total) // BYTES_PER_MIB,
            available_mib=int(memory.available) // BYTES_PER_MIB,
            swap_mib=int(swap.total) // BYTES_PER_MIB,
        ),
        storage_free_mib=_storage_free_mib(),
        accelerators=apple_accelerators() if apple else (),
        execution_providers=execution_providers(apple=system == "Darwin"),
        power=battery_elsewhere(psutil.sensors_battery()),
        sources=("measured by the device's own profiler with psutil",),
    )


def battery_elsewhere(battery: object | None) -> Power:
    """Turn psutil's battery, `None` where there is none, into ours."""
    if battery is None:
        return Power()
    percent = getattr(battery, "percent", None)
    plugged = getattr(battery, "power_plugged", None)
    return Power(
        source="unknown" if plugged is None else "mains" if plugged else "battery",
        battery_percent=None if percent is None else min(100.0, max(0.0, float(percent))),
    )
