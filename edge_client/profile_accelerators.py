"""Find GPUs, NPUs and TPUs by their device nodes and drivers; opens no device and loads no library.

An accelerator without memory of its own takes it from the budget that training has; where a driver
is not known to have its own, it is taken to share: planning too little is safe, too much is not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from device_profiles.schema import Accelerator
from edge_client.profile_linux import BYTES_PER_MIB, children, read_int, read_text

NVIDIA_SMI_TIMEOUT_S = 0.2
MOST_MIB = 2**40

# Driver in /sys/class/accel → its name and whether it shares system memory.
_ACCEL_DRIVERS = {
    "intel_vpu": ("Intel NPU", True),
    "amdxdna": ("AMD XDNA NPU", True),
    "rocket": ("Rockchip NPU", True),
    "ethosu": ("Arm Ethos-U NPU", True),
    "ane": ("Apple Neural Engine", True),
    "habanalabs": ("Intel Gaudi", False),
    "qaic": ("Qualcomm Cloud AI 100", False),
}

_DRM_DRIVERS = {
    "i915": "Intel graphics",
    "xe": "Intel graphics",
    "amdgpu": "AMD graphics",
    "asahi": "Apple GPU",
}

# A processor's own Radeon gets a slice of system memory that is rarely larger than this.
_OWN_MEMORY_FROM_MIB = 4096

_TEGRA_NODES = ("dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu", "sys/devices/gpu.0")

# Chips of NVIDIA in which GPU and CPU have one memory, though the driver is that of cards.
_NVIDIA_SHARED = ("GB10", "Thor", "Orin")

# Vendors' own drivers, each with nodes of its own: pattern in /dev → kind and name. All share.
_VENDOR_NODES: tuple[tuple[str, str, str], ...] = (
    ("kgsl-3d0", "gpu", "Qualcomm Adreno"),
    ("mali0", "gpu", "Arm Mali"),
    ("rknpu", "npu", "Rockchip NPU"),
    ("nvhost-(ctrl-)?nvdla0", "npu", "NVIDIA DLA"),
    (r"(fastrpc-cdsp|adsprpc-smd)(-secure)?", "npu", "Qualcomm Hexagon"),
    ("galcore", "npu", "VeriSilicon GPU or NPU"),
    ("apusys", "npu", "MediaTek APU"),
)


def _npu(name: str, *, shares: bool = True) -> Accelerator:
    return Accelerator(kind="npu", name=name, shares_system_memory=shares)


# On cards and sticks, with memory of their own. The Edge TPU keeps 8 MiB on its chip.
_HAILO = _npu("Hailo NPU", shares=False)
_CORAL = Accelerator(
    kind="tpu", name="Google Coral Edge TPU", memory_mib=8, shares_system_memory=False
)
# A stick is Global Unichip's until its firmware is loaded, then Google's.
_CORAL_USB = {("1a6e", "089a"), ("18d1", "9302")}

# PCI vendor and device; None: each of the class "processing accelerators".
_PCI: dict[tuple[str, str | None], Accelerator] = {
    ("8086", None): _npu("Intel NPU"),
    ("1022", "1502"): _npu("AMD XDNA NPU"),
    ("1022", "17f0"): _npu("AMD XDNA NPU"),
    ("1da3", None): _npu("Intel Gaudi", shares=False),
    ("1e60", None): _HAILO,
    ("1ac1", "089a"): _CORAL,
}
_PCI_CLASS = "1200"


def read_accelerators(root: Path, *, ask: bool = False) -> tuple[Accelerator, ...]:
    """List the accelerators that the kernel shows, GPUs first.

    `ask` lets NVIDIA's driver say how much memory its cards have, in 0.2 s at most.
    """
    gpus = _tegra_gpus(root) or _nvidia_gpus(root, ask)
    vendors = list(_vendor_nodes(root))
    return (
        *gpus,
        *_drm_gpus(root),
        *(found for found in vendors if found.kind == "gpu"),
        *_npus(root, vendors),
        *_pluggable(root),
        *_without_driver(root),
    )


def apple_accelerators() -> tuple[Accelerator, ...]:
    """List what every Apple chip has: a GPU and a Neural Engine in the memory of its CPU."""
    return (
        Accelerator(kind="gpu", name="Apple GPU", shares_system_memory=True),
        _npu("Apple Neural Engine"),
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """List the entries of a folder whose whole name matches."""
    return [path for path in children(folder) if re.fullmatch(pattern, path.name)]


def _uevent(device: Path) -> dict[str, str]:
    """Read what the kernel says of a device: its driver, its numbers on the bus."""
    lines = (read_text(device / "uevent") or "").splitlines()
    return {key: value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _tegra_gpus(root: Path) -> list[Accelerator]:
    """Find the GPU of a Jetson: one chip with the CPU, one memory for both."""
    if not any(_exists(root / node) for node in _TEGRA_NODES):
        return []
    name = "NVIDIA Tegra integrated GPU"
    return [Accelerator(kind="gpu", name=name, shares_system_memory=True)]


def _nvidia_gpus(root: Path, ask: bool) -> list[Accelerator]:
    """Find NVIDIA cards: by name where the driver tells, else by device node."""
    names: list[str] = []
    for card in children(root / "proc/driver/nvidia/gpus"):
        found = re.search(r"^Model:\s*(\S.*)$", read_text(card / "information") or "", re.MULTILINE)
        names.append(found[1].strip()[:120] if found else "NVIDIA GPU")
    names = names or ["NVIDIA GPU" for _ in _numbered(root / "dev", r"nvidia[0-9]+")]
    said = _nvidia_smi() if ask and names else []
    # It lists the cards that this process may use, by name; device nodes may be fewer than those.
    known = said or [(name, None) for name in names]
    return [_nvidia_gpu(name, mib) for name, mib in known]


def _nvidia_gpu(name: str, memory_mib: int | None) -> Accelerator:
    shares = any(word in name for word in _NVIDIA_SHARED)
    return Accelerator(
        kind="gpu",
        name=name,
        memory_mib=None if shares else memory_mib,
        shares_system_memory=shares,
    )


def _nvidia_smi() -> list[tuple[str, int | None]]:
    """Ask the driver's own program for names and memory (MiB); nothing where it takes long."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    found: list[tuple[str, int | None]] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, comma, mib = (part.strip() for part in line.rpartition(","))
        if comma and name:
            known = int(mib) if mib.isdecimal() and len(mib) < 9 else None
            found.append((name[:120], known))
    return found


def _drm_gpus(root: Path) -> list[Accelerator]:
    """Find the GPUs among the DRM cards; drivers for display alone are left out."""
    found: list[Accelerator] = []
    for card in _numbered(root / "sys/class/drm", r"card[0-9]+"):
        driver = _uevent(card / "device").get("DRIVER", "")
        if driver not in _DRM_DRIVERS:
            continue
        vram_bytes = read_int(card / "device/mem_info_vram_total") or read_int(
            card / "device/tile0/physical_vram_size_bytes"
        )
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


def _vendor_nodes(root: Path) -> Iterator[Accelerator]:
    """Find the accelerators of vendors' own drivers; several nodes of one are one accelerator."""
    nodes = [path.name for path in children(root / "dev")]
    devfreq = [path.name for path in children(root / "sys/class/devfreq")]
    drivers = {path.name for path in children(root / "sys/bus/platform/drivers/RKNPU")}
    rockchip = [name for name in (*devfreq, *drivers) if name.endswith("npu")]
    for pattern, kind, name in _VENDOR_NODES:
        seen = any(re.fullmatch(pattern, node) for node in nodes)
        if seen or (pattern == "rknpu" and rockchip):
            yield Accelerator.model_validate(
                {"kind": kind, "name": name, "shares_system_memory": True}
            )


def _npus(root: Path, vendors: list[Accelerator]) -> list[Accelerator]:
    """Find NPUs: the kernel's accel class, and vendors' own drivers beside it."""
    found: list[Accelerator] = []
    for device in _numbered(root / "sys/class/accel", r"accel[0-9]+"):
        driver = _uevent(device / "device").get("DRIVER", "")
        unknown = (f"NPU ({driver[:80] or 'unknown driver'})", True)
        name, shares = _ACCEL_DRIVERS.get(driver, unknown)
        found.append(_npu(name, shares=shares))
    if not found:
        nodes = _numbered(root / "dev/accel", r"accel[0-9]+")
        found.extend(_npu("NPU (unknown driver)") for _ in nodes)
    names = {npu.name for npu in found}
    return [*found, *(npu for npu in vendors if npu.kind == "npu" and npu.name not in names)]


def _without_driver(root: Path) -> Iterator[Accelerator]:
    """Find accelerators on the PCI bus that no driver has taken."""
    for device in children(root / "sys/bus/pci/devices"):
        said = _uevent(device)
        vendor, _, number = said.get("PCI_ID", "").lower().partition(":")
        found = _PCI.get((vendor, number))
        if found is None and said.get("PCI_CLASS", "").startswith(_PCI_CLASS):
            found = _PCI.get((vendor, None))
        if found and "DRIVER" not in said:
            yield found.model_copy(update={"name": f"{found.name} (no driver)"})


def _pluggable(root: Path) -> list[Accelerator]:
    """Find accelerators on a card or stick with memory of their own: Hailo and Coral."""
    hailos = _numbered(root / "dev", r"hailo[0-9]+")
    corals = _numbered(root / "dev", r"apex_[0-9]+")
    sticks = [
        device
        for device in children(root / "sys/bus/usb/devices")
        if (read_text(device / "idVendor"), read_text(device / "idProduct")) in _CORAL_USB
    ]
    return [*(_HAILO for _ in hailos), *(_CORAL for _ in (*corals, *sticks))]
