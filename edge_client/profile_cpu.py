"""Read /proc/cpuinfo and the clocks in /sys: architecture, features, cores by kind.

x86, 64-bit ARM and both forms of 32-bit ARM are understood; anything else counts its processors.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from device_profiles.schema import CoreGroup
from edge_client.arm_parts import arm_part
from edge_client.profile_linux import read_int, read_text

MOST_CORES = 4096  # as the schema allows; more than any machine has

# The kernel's word → ours. Only what decides how a kernel library computes.
_ARM_FEATURES = {
    "neon": "neon",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
_X86_FEATURES = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """What /proc/cpuinfo says: fields of each processor, and those of the whole machine."""

    processors: tuple[dict[str, str], ...]
    machine: dict[str, str]


def read_cpuinfo(root: Path) -> CpuInfo:
    """Parse /proc/cpuinfo; nothing in it where it cannot be read.

    A line `processor : 0` starts a processor and a blank line ends it; what stands outside
    belongs to all of them (old 32-bit kernels put Features and CPU part there). 64-bit ARM kernels
    up to 3.10 list the numbers first: what they then say once, after the last, is for all too.
    """
    machine: dict[str, str] = {}
    processors: list[dict[str, str]] = []
    current = machine
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            current = machine if not key else current
        elif key == "processor" and value.isdecimal():
            current = {key: value}
            processors.append(current)
        else:
            current.setdefault(key, value)
    if not processors and "processor" in machine:  # ARMv6 with one core has no numbered line
        processors.append({"processor": "0", "model name": machine["processor"]})
    if processors and len(processors[0]) == 1:
        machine = {**processors[-1], **machine}
    return CpuInfo(tuple({**machine, **one} for one in processors), machine)


def read_features(info: CpuInfo, architecture: str) -> tuple[str, ...]:
    """Return the features that every core has, sorted, in our words.

    Only those of the `architecture` count: an emulated one may be shown its host's cpuinfo.
    """
    words = [_words(one) for one in info.processors if _words(one)]
    common = set.intersection(*words) if words else set()
    known = {} if architecture.startswith(("aarch", "arm")) else _X86_FEATURES
    if architecture not in ("x86_64", "i686"):
        known = known | _ARM_FEATURES
    return tuple(sorted({known[word] for word in common if word in known}))


def _words(processor: dict[str, str]) -> set[str]:
    return set(processor.get("features", processor.get("flags", "")).lower().split())


def read_architecture(info: CpuInfo) -> str:
    """Guess `uname -m` from what only that architecture's cpuinfo says."""
    if not info.processors:
        return "unknown"
    one = info.processors[0]
    words = _words(one)
    if "vendor_id" in one and "fpu" in words:
        return "x86_64" if "lm" in words else "i686"
    if "asimd" in words:
        return "aarch64"
    if "v6l" in one.get("model name", ""):
        return "armv6l"
    if words & {"half", "thumb", "swp"}:
        return "armv7l"
    return "riscv64" if one.get("isa", "").startswith("rv64") else "unknown"


def read_cores(root: Path, info: CpuInfo) -> tuple[CoreGroup, ...]:
    """Count physical cores by kind and highest clock, fastest first."""
    hybrid = _hybrid_kinds(root)
    cores: list[tuple[str, int | None]] = []
    seen: set[tuple[str, str]] = set()
    for one in info.processors:
        place = (one.get("physical id", ""), one.get("core id", ""))
        if place[1] and place in seen:
            continue  # the second thread of a core
        seen.add(place)
        index = int(one["processor"][:6])
        cores.append((_kind(one, hybrid.get(index)), _cpufreq_mhz(root, index)))
    fallback_mhz = _clock_in_cpuinfo(info)
    known: dict[str, int] = {}
    for kind, mhz in cores:
        if mhz is not None:
            known[kind] = max(mhz, known.get(kind, 0))
    counts = Counter((kind, mhz or known.get(kind, fallback_mhz)) for kind, mhz in cores)
    groups = [
        CoreGroup(kind=kind, count=min(n, MOST_CORES), max_mhz=mhz)
        for (kind, mhz), n in counts.items()
    ]
    return tuple(sorted(groups, key=lambda group: -(group.max_mhz or 0)))


def _kind(processor: dict[str, str], hybrid: str | None) -> str:
    """Name a core: Arm part number, else the model name."""
    try:
        implementer = int(processor["cpu implementer"], 16)
        part = int(processor["cpu part"], 16)
    except (KeyError, ValueError):
        model = " ".join(processor.get("model name", "").split())[:120] or "unknown"
        return f"{model} {hybrid}" if hybrid else model
    return arm_part(implementer, part)


def _hybrid_kinds(root: Path) -> dict[int, str]:
    """Return "P-core" or "E-core" by processor number on Intel's hybrid processors."""
    kinds: dict[int, str] = {}
    for folder, kind in (("cpu_core", "P-core"), ("cpu_atom", "E-core")):
        text = read_text(root / "sys/devices" / folder / "cpus") or ""
        for first, last in re.findall(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text):
            kinds.update(dict.fromkeys(range(int(first), int(last or first) + 1), kind))
    return kinds


def _cpufreq_mhz(root: Path, index: int) -> int | None:
    """Return a processor's highest clock from cpufreq, which counts in kHz."""
    folder = root / f"sys/devices/system/cpu/cpu{index}/cpufreq"
    khz = read_int(folder / "cpuinfo_max_freq") or read_int(folder / "scaling_max_freq")
    return _plausible_mhz(khz / 1000) if khz else None


def _clock_in_cpuinfo(info: CpuInfo) -> int | None:
    """Return the highest clock that cpuinfo itself speaks of: a lower bound of the true one."""
    clocks_mhz = [0.0]
    for one in info.processors:
        now = re.match(r"[0-9]{1,6}(\.[0-9]+)?", one.get("cpu mhz", ""))
        named = re.search(r"@ *([0-9.]{1,6}) *GHz", one.get("model name", ""))
        clocks_mhz.append(float(now[0]) if now else 0.0)
        if named and re.fullmatch(r"[0-9]+(\.[0-9]+)?", named[1]):
            clocks_mhz.append(1000 * float(named[1]))
    return _plausible_mhz(max(clocks_mhz))


def _plausible_mhz(mhz: float) -> int | None:
    return round(mhz) if 1 <= mhz <= 100_000 else None


def board_in_cpuinfo(info: CpuInfo) -> str | None:
    """Return the board (`Model`, `Hardware`) or the processor that cpuinfo names."""
    for key in ("model", "hardware"):
        name = info.machine.get(key, "")
        if name and not name.isdecimal():
            return name[:120]
    first = info.processors[0] if info.processors else {}
    return first.get("model name", "")[:120] or None
