"""A profile for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from device_profiles.schema import DeviceProfile, Link, Speed


def show_profile(profile: DeviceProfile) -> None:
    """Print a profile as a table; what nobody knows is "unknown"."""
    table = Table(title=profile.title, show_header=False, title_justify="left")
    for label, value in _rows(profile):
        table.add_row(label, value or "unknown")
    Console(markup=False).print(table)


def _rows(profile: DeviceProfile) -> list[tuple[str, str]]:
    memory, power = profile.memory, profile.power
    cores = ", ".join(
        f"{c.count} × {c.kind}" + (f" at {c.max_mhz} MHz" if c.max_mhz else "")
        for c in profile.cores
    )
    rows = [
        ("board or model", profile.board_or_model),
        ("architecture", profile.architecture),
        ("cores", cores),
        ("CPU features", " ".join(profile.cpu_features)),
        ("memory", _mib(memory.total_mib)),
        ("memory available", _mib(memory.available_mib)),
        ("swap", _mib(memory.swap_mib)),
        ("memory limit (cgroup)", _mib(memory.limit_mib) or "none"),
        ("storage free", _mib(profile.storage_free_mib)),
        ("power", f"{power.source}{_percent(power.battery_percent)}"),
        ("temperature", "" if profile.temperature_c is None else f"{profile.temperature_c:.0f} °C"),
        ("throttled now", _yes(profile.throttled)),
        ("network", _network(profile.link)),
        ("ONNX Runtime", _providers(profile.execution_providers)),
    ]
    for accelerator in profile.accelerators:
        shared = "shares system memory" if accelerator.shares_system_memory else "own memory"
        size = _mib(accelerator.memory_mib)
        rows.append((accelerator.kind.upper(), f"{accelerator.name}, {shared} {size}".strip()))
    if profile.speed != Speed():
        rows.append(("measured speed", _speed(profile.speed)))
    return rows if profile.accelerators else [*rows, ("accelerators", "none found")]


def _speed(speed: Speed) -> str:
    found = {
        "7-zip {} MIPS": speed.sevenzip_mips,
        "{} on one core": speed.sevenzip_mips_one_core,
        "memcpy {} MB/s": speed.memcpy_mb_s,
    }
    return ", ".join(words.format(value) for words, value in found.items() if value is not None)


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value} MiB"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _providers(found: tuple[str, ...] | None) -> str:
    if found is None:
        return ""
    return " ".join(name.removesuffix("ExecutionProvider") for name in found) or "not installed"


def _network(link: Link | None) -> str:
    if link is None:
        return ""
    speeds = {mbit for mbit in (link.down_mbit, link.up_mbit) if mbit is not None}
    speed = " / ".join(f"{mbit:g}" for mbit in sorted(speeds, reverse=True))
    kind = "" if link.kind == "unknown" else f"{link.kind}, "
    speed = f"{speed} Mbit/s, " if speed else ""
    metered = {True: "metered", False: "not metered", None: "metered or not is unknown"}
    return f"{kind}{speed}{metered[link.metered]}"


def _percent(value: float | None) -> str:
    return "" if value is None else f", {value:.0f} %"
