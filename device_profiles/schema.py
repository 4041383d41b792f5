"""Describe a device: one schema for recorded profiles and for what a device measures of itself.

Sizes are MiB (2**20 bytes), clocks MHz, link speeds Mbit/s (10**6 bit/s), temperatures °C.
`None` means that nobody knows, never zero. A profile says what a device has, not what it is to do
with it: the rank comes from the memory model, so no profile names one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_profiles.errors import ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILE_DIR = Path(__file__).parent

Count = Annotated[int, Field(ge=1, le=4096)]
Count32 = Annotated[int, Field(ge=1, le=2**31 - 1)]
Mib = Annotated[int, Field(ge=0, le=2**40)]
Mhz = Annotated[int, Field(ge=1, le=100_000)]
Mbit = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Celsius = Annotated[float, Field(ge=-60, le=200, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=400)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]


class _Part(BaseModel):
    """Refuse unknown fields and later changes in every part of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CoreGroup(_Part):
    """Count the physical cores of one kind; `max_mhz` is their highest clock."""

    kind: Text
    count: Count
    max_mhz: Mhz | None = None


class Memory(_Part):
    """Say how much main memory there is, and how much of it a program may take.

    `total_mib` and `available_mib` have no default: a recorded profile must give both, and only a
    device that could not read its own passes `None`.
    """

    total_mib: Mib | None
    available_mib: Mib | None  # at idle, as the kernel's MemAvailable
    swap_mib: Mib | None = None
    limit_mib: Mib | None = None  # cgroup limit; None: no limit, or none known

    @property
    def usable_mib(self) -> int | None:
        """Return the smaller of what is available and the limit, `None` where neither is known."""
        known = [mib for mib in (self.available_mib, self.limit_mib) if mib is not None]
        return min(known, default=None)


class Speed(_Part):
    """Say how fast the device was measured to be, by two well-known programs.

    None of it enters a plan: a device measures its own training steps.
    """

    sevenzip_mips: Count32 | None = None  # `7z b`, all cores together, in its own MIPS
    sevenzip_mips_one_core: Count32 | None = None  # the fastest
    memcpy_mb_s: Count32 | None = None  # memory copied by one core, 10**6 bytes a second


class Accelerator(_Part):
    """Name one accelerator; where it shares system memory it counts against the same budget."""

    kind: Literal["gpu", "npu", "tpu"]
    name: Text
    memory_mib: Mib | None = None  # its own memory; None: shared or unknown
    shares_system_memory: bool


class Power(_Part):
    """Say what feeds the device."""

    source: Literal["mains", "battery", "unknown"] = "unknown"
    battery_percent: Percent | None = None


class Link(_Part):
    """Say how the device reaches the network, how fast, and whether each byte costs money.

    A speed that a device measured of itself is its port's, at most that of the line behind it.
    """

    kind: Literal["ethernet", "wifi", "cellular", "vpn", "unknown"] = "unknown"
    down_mbit: Mbit | None = None
    up_mbit: Mbit | None = None
    metered: bool | None = None


class DeviceProfile(_Part):
    """Describe one device: its cores, memory, accelerators, power and link, and who says so."""

    name: Slug
    title: Text
    board_or_model: Text
    architecture: Text  # as `uname -m` prints it: aarch64, armv7l, x86_64
    cpu_features: tuple[Text, ...] = ()
    cores: tuple[CoreGroup, ...] = ()
    memory: Memory
    speed: Speed = Speed()
    storage_free_mib: Mib | None = None
    accelerators: tuple[Accelerator, ...] = ()
    execution_providers: tuple[Text, ...] | None = None  # of ONNX Runtime; empty: not installed
    power: Power = Power()
    link: Link | None = None
    temperature_c: Celsius | None = None
    throttled: bool | None = None
    sources: tuple[Text, ...] = ()

    @property
    def core_count(self) -> int:
        """Return the number of physical cores of all kinds, 0 where unknown."""
        return sum(group.count for group in self.cores)


def bundled_names() -> tuple[str, ...]:
    """List the names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in PROFILE_DIR.glob("*.toml")))


def check_bundled(name: str) -> None:
    """Check that a profile comes with the package, as those do that a trace may name.

    Raises:
        ProfileError: it does not; the error lists those that do.
    """
    if name not in (names := bundled_names()):
        why = f"a trace names one that comes with the package: {', '.join(names)}"
        raise ProfileError(repr(name), why)


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Read a bundled profile by its name, or any profile by the path of its .toml file.

    Raises:
        ProfileError: no such name (the error lists those there are), no such file, no TOML, or a
            field that is missing, unknown or out of bounds (the error names file and field).
    """
    path = _locate(name_or_path)
    document = _read_toml(path)
    try:
        return DeviceProfile.model_validate(document)
    except ValidationError as error:
        raise ProfileError(str(path), _first_fault(error)) from error


def _locate(name_or_path: str | Path) -> Path:
    """Return the file that a name or a path means."""
    text = str(name_or_path)
    names = bundled_names()
    if text in names:
        return PROFILE_DIR / f"{text}.toml"
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return Path(name_or_path)
    raise ProfileError(
        repr(text), f"no profile has this name; use one of {', '.join(names)}, or a .toml file"
    )


def _read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file, turning every way in which that can fail into a `ProfileError`."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ProfileError(str(path), f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(str(path), f"is not UTF-8: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(str(path), f"is not TOML: {error}") from error


def _first_fault(error: ValidationError) -> str:
    """Name the first field that is wrong, why, and how many more there are."""
    faults = error.errors(include_url=False, include_input=False)
    field = ".".join(str(part) for part in faults[0]["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"field {field}: {faults[0]['msg']}{more}"
