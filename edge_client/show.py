"""A profile for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from device_profiles.schema import DeviceProfile


def show_profile(profile: DeviceProfile) -> None:
    """Print a profile as a table; what nobody knows is "unknown"."""
    table = Table(title=profile.title, show_header=False, title_justify="left")
    for label, value in _rows(profile):
        table.add_row(label, value or "unknown")
    Console().print(table)


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
        ("temperature", f"{profile.temperature_c:.0f} °C" if profile.temperature_c else ""),
    ]
    for accelerator in profile.accelerators:
        shared = "shares system memory" if accelerator.shares_system_memory else "own memory"
        size = _mib(accelerator.memory_mib)
        rows.append((accelerator.kind.upper(), f"{accelerator.name}, {shared} {size}".strip()))
    return rows if profile.accelerators else [*rows, ("accelerators", "none found")]


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value} MiB"


def _percent(value: float | None) -> str:
    return "" if value is None else f", {value:.0f} %"
