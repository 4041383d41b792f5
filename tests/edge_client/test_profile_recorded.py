"""The profiler on recorded /proc and /sys of real machines.

The recordings lie in the folder that TUNEFLEET_DATA names, by default ../shared/data beside the
repository; without them these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edge_client import cli
from edge_client.errors import ConfigError
from edge_client.profile import measure_profile, native_bf16

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TUNEFLEET_DATA", REPOSITORY.parent / "shared" / "data"))
TRACES = DATA / "traces"
PHONES = sorted(
    path
    for path in (TRACES / "phones_cpuinfo" / "proc_cpuinfo").glob("*")
    if path.suffix in (".txt", ".log")
)


@pytest.mark.skipif(not TRACES.is_dir(), reason="no recorded trees here")
def test_recorded_laptop(tmp_path: Path) -> None:
    recorded = TRACES / "linux_procfs"
    root = tmp_path / "root"
    shutil.copytree(recorded, root, copy_function=shutil.copyfile, symlinks=True)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    (battery,) = recorded.glob("sys/devices/**/power_supply/BAT0")
    shutil.copytree(battery, root / "sys/class/power_supply/BAT0", copy_function=shutil.copyfile)
    profile = measure_profile(root)
    assert profile.cores[0].kind.startswith("Intel(R) Core(TM) i7-8650U")
    assert profile.core_count == 4  # of eight threads
    assert profile.memory.total_mib == 15299
    available_mib = profile.memory.available_mib  # this kernel gave no MemAvailable
    assert available_mib is not None and 12_000 < available_mib < 15_299
    assert profile.temperature_c == pytest.approx(49.925)
    assert profile.power.source == "battery"
    assert profile.power.battery_percent == 98


@pytest.mark.skipif(not PHONES, reason="no recorded phones here")
@pytest.mark.parametrize("recorded", PHONES, ids=lambda path: path.stem)
def test_recorded_phone(tmp_path: Path, recorded: Path) -> None:
    (tmp_path / "proc").mkdir()
    shutil.copyfile(recorded, tmp_path / "proc" / "cpuinfo")
    profile = measure_profile(tmp_path)
    text = recorded.read_text(encoding="utf-8", errors="replace").lower()
    assert profile.architecture in {"aarch64", "armv7l", "armv6l", "x86_64", "i686"}
    assert profile.core_count >= 1
    assert ("neon" in profile.cpu_features) == ("neon" in text or "asimd" in text)
    assert not native_bf16(profile)  # none of them is from after 2018


@pytest.mark.skipif(not PHONES, reason="no recorded phones here")
@pytest.mark.parametrize(
    ("stem", "cores", "architecture"),
    [
        ("raspberrypi", {"ARM1176": 1}, "armv6l"),
        ("raspberrypi3", {"Cortex-A53": 4}, "armv7l"),
        ("huawei-mate-10", {"Cortex-A53": 4, "Cortex-A73": 4}, "aarch64"),
        ("jetson-tx1", {"Cortex-A57": 4}, "aarch64"),
        ("oppo-a37", {"Cortex-A53": 4}, "aarch64"),  # numbers first, then one block for all
    ],
)
def test_recorded_cores(
    tmp_path: Path, stem: str, cores: dict[str, int], architecture: str
) -> None:
    (recorded,) = (path for path in PHONES if path.stem == stem)
    (tmp_path / "proc").mkdir()
    shutil.copyfile(recorded, tmp_path / "proc" / "cpuinfo")
    profile = measure_profile(tmp_path)
    assert {group.kind: group.count for group in profile.cores} == cores
    assert profile.architecture == architecture


def test_a_folder_without_a_recorded_proc_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    with pytest.raises(ConfigError, match=r"there is no proc/ in it; name the folder"):
        cli.profile(root=tmp_path)
