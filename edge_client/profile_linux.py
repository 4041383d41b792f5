"""Read board, memory, heat and power of a Linux device from /proc and /sys.

Each function takes the root of the tree, so that recorded trees replay. What cannot be read or
makes no sense is `None`: a profile never fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from device_profiles.schema import Memory, Power

KIB_PER_MIB = 1024
BYTES_PER_MIB = 2**20
READ_LIMIT_BYTES = 4 * 2**20

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2**63.
UNLIMITED_BYTES = 2**60

# What DMI tables hold where nobody filled them in.
_PLACEHOLDERS = ("to be filled", "system product", "default string", "not applicable", "o.e.m")

_CPU_ZONES = ("cpu", "soc", "x86_pkg", "bcm2835", "coretemp")
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")

# Bits 0 to 3 of the Raspberry Pi's firmware word: under-voltage, capped, throttled, soft limit.
_PI_THROTTLED_NOW = 0b1111


def read_text(path: Path) -> str | None:
    """Return a file's text without NULs and outer blanks, `None` where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with path.open("rb") as file:
            raw = file.read(READ_LIMIT_BYTES)
    except OSError:
        return None
    return raw.decode("utf-8", "replace").replace("\0", " ").strip()


def read_int(path: Path) -> int | None:
    """Return the whole number that a file holds, `None` where it holds none."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def children(folder: Path) -> list[Path]:
    """List what is in a folder, sorted by name; nothing where it cannot be listed."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def read_board(root: Path) -> str | None:
    """Return the board's or the machine's model: device tree, else DMI."""
    for tree in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        model = _cleaned(read_text(root / tree))
        if model:
            return model
    dmi = root / "sys/class/dmi/id"
    vendor = _cleaned(read_text(dmi / "sys_vendor"))
    # Lenovo puts an order number into product_name and the name that people know beside it.
    key = "product_version" if vendor == "LENOVO" else "product_name"
    product = _cleaned(read_text(dmi / key)) or _cleaned(read_text(dmi / "product_name"))
    if product and vendor and not product.lower().startswith(vendor.lower()):
        return f"{vendor} {product}"
    return product or vendor


def _cleaned(text: str | None) -> str | None:
    """Drop what cannot be printed and the placeholders of unfilled tables."""
    printable = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())[:120]
    if not printable or any(word in printable.lower() for word in _PLACEHOLDERS):
        return None
    return printable


def read_memory(root: Path) -> Memory:
    """Return main memory, swap and the tightest cgroup limit, in MiB."""
    kib = _meminfo_kib(root)
    total_kib = kib.get("MemTotal") or None
    limits = [*_cgroup_v2_limits(root), *_cgroup_v1_limits(root)]
    return Memory(
        total_mib=_mib(total_kib),
        available_mib=_mib(_available_kib(kib)),
        swap_mib=_mib(kib.get("SwapTotal")),
        limit_mib=min(limits, default=None),
    )


def read_available_mib(root: Path) -> int | None:
    """Return what a program could take of the machine's memory, in MiB; cgroups aside."""
    return _mib(_available_kib(_meminfo_kib(root)))


def _available_kib(kib: dict[str, int]) -> int | None:
    if "MemAvailable" in kib or "MemFree" not in kib:
        return kib.get("MemAvailable")
    # Kernels before 3.14 do not say: what is free, and what caches would give back.
    gives_back = ("MemFree", "Buffers", "Cached", "SReclaimable")
    return max(0, sum(kib.get(key, 0) for key in gives_back) - kib.get("Shmem", 0))


def _mib(kib: int | None) -> int | None:
    return None if kib is None else kib // KIB_PER_MIB


def _meminfo_kib(root: Path) -> dict[str, int]:
    """Parse /proc/meminfo into kiB by name."""
    found = re.findall(
        r"^(\w+):[ \t]*([0-9]{1,15})\b", read_text(root / "proc/meminfo") or "", re.MULTILINE
    )
    return {name: int(kib) for name, kib in found}


def _cgroup_paths(root: Path) -> Iterator[tuple[list[str], str]]:
    """Yield the controllers and the path of each line in /proc/self/cgroup."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            yield fields[1].split(","), fields[2]


def _cgroup_v2_limits(root: Path) -> list[int]:
    """Return every memory.max and memory.high (MiB) from this process's group up to the top.

    Above memory.high nothing is killed, but all that the group does slows down.
    """
    top = root / "sys/fs/cgroup"
    paths = [path for controllers, path in _cgroup_paths(root) if controllers == [""]]
    return [
        mib
        for path in paths
        for file_name in ("memory.max", "memory.high")
        for mib in _limits_upwards(top, path, file_name)
    ]


def _cgroup_v1_limits(root: Path) -> list[int]:
    """Return every memory.limit_in_bytes (MiB) from this process's group up to the top."""
    top = root / "sys/fs/cgroup/memory"
    paths = [path for controllers, path in _cgroup_paths(root) if "memory" in controllers]
    return [mib for p in paths for mib in _limits_upwards(top, p, "memory.limit_in_bytes")]


def _limits_upwards(top: Path, group: str, file_name: str) -> list[int]:
    """Read one limit file in a group and in each group above it.

    In a container the group's path is often the host's and not there: then only `top` answers.
    """
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    folders = [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    limits_bytes = [read_int(folder / file_name) for folder in folders]
    return [
        limit // BYTES_PER_MIB
        for limit in limits_bytes
        if limit is not None and 0 <= limit < UNLIMITED_BYTES
    ]


def read_temperature_c(root: Path) -> float | None:
    """Return the hottest CPU zone in °C, or the hottest of any zone where none is the CPU's.

    Where the kernel has no zones, as on many PCs, the sensors of the processor answer.
    """
    of_cpu: list[float] = []
    of_all: list[float] = []
    for zone in children(root / "sys/class/thermal"):
        celsius = _celsius(zone / "temp") if zone.name.startswith("thermal_zone") else None
        if celsius is None:
            continue
        of_all.append(celsius)
        kind = (read_text(zone / "type") or "").lower()
        if any(word in kind for word in _CPU_ZONES):
            of_cpu.append(celsius)
    if not of_cpu:
        of_cpu = [celsius for sensor in _sensors(root, _CPU_SENSORS) for celsius in sensor]
    return max(of_cpu or of_all, default=None)


def _sensors(root: Path, names: Collection[str]) -> Iterator[list[float]]:
    """Yield the temperatures (°C) of each sensor chip that has one of the names."""
    for chip in children(root / "sys/class/hwmon"):
        if read_text(chip / "name") in names:
            inputs = [
                path for path in children(chip) if re.fullmatch("temp[0-9]+_input", path.name)
            ]
            yield [celsius for path in inputs if (celsius := _celsius(path)) is not None]


def _celsius(path: Path) -> float | None:
    """Read a temperature, `None` where it can be none of a running chip."""
    value = read_int(path)
    if value is None:
        return None
    celsius = value / 1000 if abs(value) >= 1000 else float(value)  # old kernels: whole °C
    return celsius if 0 < celsius < 150 else None


def read_throttled(root: Path) -> bool | None:
    """Say whether the processor is slowed down now by heat or by low voltage."""
    firmware = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if firmware:
        try:
            return bool(int(firmware, 16) & _PI_THROTTLED_NOW)
        except ValueError:
            return None
    alarms = [
        read_int(chip / "in0_lcrit_alarm")
        for chip in children(root / "sys/class/hwmon")
        if read_text(chip / "name") == "rpi_volt"  # the same firmware word, under voltage alone
    ]
    if any(alarms):
        return True
    states = [
        read_int(device / "cur_state")
        for device in children(root / "sys/class/thermal")
        if device.name.startswith("cooling_device")
        and re.match(r"processor|(thermal-)?cpufreq", (read_text(device / "type") or "").lower())
    ]
    known = [state for state in (*states, *alarms) if state is not None]
    return any(state > 0 for state in known) if known else None


def read_power(root: Path) -> Power:
    """Say whether mains or a battery feeds the device, and how full the battery is."""
    battery_percents: list[float] = []
    statuses: set[str] = set()
    online = False
    for supply in children(root / "sys/class/power_supply"):
        kind = (read_text(supply / "type") or "").lower()
        if kind == "battery":
            # Batteries of mice and headsets have scope Device and feed nothing here.
            if (read_text(supply / "scope") or "").lower() == "device":
                continue
            statuses.add((read_text(supply / "status") or "").lower())
            percent = _battery_percent(supply)
            if percent is not None:
                battery_percents.append(percent)
        elif kind in ("mains", "usb", "wireless") and read_int(supply / "online") == 1:
            online = True
    percent = sum(battery_percents) / len(battery_percents) if battery_percents else None
    if "discharging" in statuses and not online:
        return Power(source="battery", battery_percent=percent)
    if online or statuses & {"charging", "full", "not charging"}:
        return Power(source="mains", battery_percent=percent)
    return Power(source="unknown", battery_percent=percent)


def _battery_percent(supply: Path) -> float | None:
    """Return one battery's charge, 0 to 100."""
    percent: float | None = read_int(supply / "capacity")
    if percent is None:
        for unit in ("energy", "charge"):
            now, full = read_int(supply / f"{unit}_now"), read_int(supply / f"{unit}_full")
            if now is not None and full:
                percent = 100 * now / full
                break
    return None if percent is None else min(100.0, max(0.0, float(percent)))
