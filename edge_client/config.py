"""What the owner of a device decides."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from device_profiles.schema import DeviceProfile
from edge_client.errors import ConfigError
from edge_client.policy.owner import Policy
from protocol.files import user_folder
from protocol.tls import TlsFiles
from protocol.topics import NAME
from protocol.transport import BrokerAddress

NAMES = "1 to 63 small letters, digits and inner dashes"


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold an agent's settings, checked."""

    name: str
    broker: BrokerAddress
    data: tuple[Path, ...]
    state: Path
    cache: Path
    """Where calibrations are remembered."""
    profile: DeviceProfile
    tls: TlsFiles | None = None
    """Who this device is at the broker, if it has joined a fleet."""
    job: str = ""
    """The job to take part in; empty: the only one shown that is not finished."""
    model: str = ""
    """Where the base model is; empty: what the job calls it."""
    memory_cap_mib: float | None = None
    memory_scale: float = 1.0
    threads: int = 0
    """Training threads; 0: as many as are measured to be worth it."""
    download_s: float = 60.0
    """Time that one version, or an update, may take on the link: it limits rank and bands."""
    seed: int = 0
    exit_when_done: bool = False
    compare_alone: bool = False
    private_rank: int = 0
    """Rank of an adapter of the device's own beside the shared one; 0: none."""
    wait_for_broker: bool = True

    policy: Policy = field(default_factory=Policy)
    """When and how much the owner lets it train and transfer."""
    system_root: Path = Path("/")
    """Below it /proc and /sys are read for the policy."""
    checkpoint_s: float = 300.0
    """A training under way is kept on disk as often."""
    train_blocks: int = 0
    """Train the last so many blocks alone, where the job lets a device; 0: as many as fit."""
    backend: Literal["auto", "torch", "onnx"] = "auto"
    onnx: Path | None = None
    """Folder of an artifact set of the base model (edge_client/ort); None: there is none."""

    def __post_init__(self) -> None:
        """Check what a person gives.

        Raises:
            ConfigError: a setting is out of bounds; says which, and what it may be.
        """
        check_memory_cap(self.memory_cap_mib)
        bounds: list[tuple[str, bool, str]] = [
            ("--memory-scale", 0 < self.memory_scale <= 1e9, "above 0, to 1e9"),
            ("--threads", 0 <= self.threads <= 1024, "from 1 to 1024, or 0: measured"),
            ("--seed", 0 <= self.seed < 1 << 48, "from 0 to below 2^48"),
            ("--private-rank", 0 <= self.private_rank <= 4096, "from 1 to 4096, or 0: none"),
            ("--train-blocks", 0 <= self.train_blocks <= 4096, "from 1, or 0: as many as fit"),
            ("--checkpoint-every", 0 <= self.checkpoint_s <= 1e9, "from 0 to 1e9 seconds"),
            ("--job", not self.job or bool(re.fullmatch(NAME, self.job)), f"a name: {NAMES}"),
        ]
        for option, fine, what in bounds:
            if not fine:
                raise ConfigError(f"{option} must be {what}")

    @property
    def download_bytes(self) -> float:
        """Return the bytes that one version may take on this device's link."""
        link = self.profile.link
        return self._carries(link.down_mbit if link else None)

    @property
    def upload_bytes(self) -> float:
        """Return the bytes that one update may take on it."""
        link = self.profile.link
        return self._carries(link.up_mbit if link else None)

    def _carries(self, mbit: float | None) -> float:
        return float("inf") if mbit is None else mbit * 1e6 / 8 * self.download_s


def check_name(name: str) -> str:
    """Return a device's name.

    Raises:
        ConfigError: it can't stand in a topic.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r} can't be a device's name: use {NAMES}")
    return name


def check_memory_cap(cap_mib: float | None) -> None:
    """Refuse a cap that no training could keep.

    Raises:
        ConfigError: it is out of bounds, or no number.
    """
    if cap_mib is not None and not 1 <= cap_mib <= 1e9:
        raise ConfigError("--memory-cap must be from 1 to 1e9 MiB")


def check_cache(folder: Path) -> Path:
    """Make the folder of measured constants, and return it.

    Raises:
        ConfigError: it can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
    except OSError as error:
        raise ConfigError(
            f"can't keep measured constants in {folder}: {error.strerror}; name a folder that can "
            "be written to with --cache"
        ) from None
    return folder


def default_state(name: str) -> Path:
    """Return where a device's state is kept."""
    return user_folder() / name


def most_threads(profile: DeviceProfile) -> int:
    """Return the number of cores, the most threads that training may use."""
    here = os.cpu_count() or 2
    return min(profile.core_count or here, here)
