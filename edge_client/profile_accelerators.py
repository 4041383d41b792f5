"""Find GPUs, NPUs and TPUs by their device nodes and drivers; opens no device and loads no library.

An accelerator without memory of its own takes it from the budget that training has; where a driver
is not known to have its own, it is taken to share: planning too little is safe, too much is not.
"""

from __future__ import annotations

import re
from pathlib import Path

from device_profiles.schema import Accelerator
from edge_client.profile_linux import BYTES_PER_MIB, children, read_int, read_text

# Driver in /sys/class/accel → its name and whether it shares system memory.
_ACCEL_DRIVERS = {
    "intel_vpu": ("Intel NPU", True),
    "amdxdna": ("AMD XDNA NPU", True),
    "rocket": ("Rockchip NPU", True),
    "ethosu": ("Arm Ethos-U NPU", True),
    "habanalabs": ("Intel Gaudi", False),
    "qaic": ("Qualcomm Cloud AI 100", False),
}

_DRM_DRIVERS = {"i915": "Intel graphics", "xe": "Intel graphics", "amdgpu": "AMD graphics"}

# A processor's own Radeon gets a slice of system memory that is rarely larger than this.
_OWN_MEMORY_FROM_MIB = 4096

_TEGRA_NODES = ("dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu", "sys/devices/gpu.0")


def read_accelerators(root: Path) -> tuple[Accelerator, ...]:
    """List the accelerators that the kernel shows, GPUs first."""
    gpus = _tegra_gpus(root) or _nvidia_gpus(root)
    return (*gpus, *_drm_gpus(root), *_npus(root), *_pluggable(root))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """List the entries of a folder whose whole name matches."""
    return [path for path in children(folder) if re.fullmatch(pattern, path.name)]


def _driver(device: Path) -> str:
    """Return the kernel driver of a device, "" where unknown."""
    found = re.search(r"^DRIVER=(\S+)", read_text(device / "uevent") or "", re.MULTILINE)
    return found[1] if found else ""


def _tegra_gpus(root: Path) -> list[Accelerator]:
    """Find the GPU of a Jetson: one chip with the CPU, one memory for both."""
    if not any(_exists(root / node) for node in _TEGRA_NODES):
        return []
    name = "NVIDIA Tegra integrated GPU"
    return [Accelerator(kind="gpu", name=name, shares_system_memory=True)]


def _nvidia_gpus(root: Path) -> list[Accelerator]:
    """Find NVIDIA cards: by name where the driver tells, else by device node."""
    names: list[str] = []
    for card in children(root / "proc/driver/nvidia/gpus"):
        found = re.search(r"^Model:\s*(\S.*)$", read_text(card / "information") or "", re.MULTILINE)
        names.append(found[1].strip()[:120] if found else "NVIDIA GPU")
    names = names or ["NVIDIA GPU" for _ in _numbered(root / "dev", r"nvidia[0-9]+")]
    return [Accelerator(kind="gpu", name=name, shares_system_memory=False) for name in names]


def _drm_gpus(root: Path) -> list[Accelerator]:
    """Find Intel and AMD graphics among the DRM cards; display-only drivers are left out."""
    found: list[Accelerator] = []
    for card in _numbered(root / "sys/class/drm", r"card[0-9]+"):
        driver = _driver(card / "device")
        if driver not in _DRM_DRIVERS:
            continue
        vram_bytes = read_int(card / "device/mem_info_vram_total")
        vram_mib = vram_bytes // BYTES_PER_MIB if vram_bytes and 0 < vram_bytes < 2**60 else None
        shares = vram_mib is None or vram_mib < _OWN_MEMORY_FROM_MIB
        found.append(
            Accelerator(
                kind="gpu",
                name=f"{_DRM_DRIVERS[driver]} ({driver})",
                memory_mib=None if shares else vram_mib,
                shares_system_memory=shares,
            )
        )
    return found


def _npus(root: Path) -> list[Accelerator]:
    """Find NPUs: the kernel's accel class first, then Rockchip's own driver."""
    found: list[Accelerator] = []
    for device in _numbered(root / "sys/class/accel", r"accel[0-9]+"):
        driver = _driver(device / "device")
        name, shares = _ACCEL_DRIVERS.get(driver, (f"NPU ({driver or 'unknown driver'})", True))
        found.append(Accelerator(kind="npu", name=name, shares_system_memory=shares))
    if not found:
        nodes = _numbered(root / "dev/accel", r"accel[0-9]+")
        unknown = Accelerator(kind="npu", name="NPU (unknown driver)", shares_system_memory=True)
        found.extend(unknown for _ in nodes)
    devfreq = [p for p in children(root / "sys/class/devfreq") if p.name.endswith("npu")]
    if (devfreq or _exists(root / "dev/rknpu")) and not found:
        found.append(Accelerator(kind="npu", name="Rockchip NPU", shares_system_memory=True))
    return found


def _pluggable(root: Path) -> list[Accelerator]:
    """Find accelerators on a card or stick with memory of their own: Hailo and Coral."""
    hailos = _numbered(root / "dev", r"hailo[0-9]+")
    corals = _numbered(root / "dev", r"apex_[0-9]+")
    hailo = Accelerator(kind="npu", name="Hailo NPU", shares_system_memory=False)
    coral = Accelerator(kind="tpu", name="Google Coral Edge TPU", shares_system_memory=False)
    return [*(hailo for _ in hailos), *(coral for _ in corals)]
