"""The profiler on what sbc-bench printed on real boards: its logs, and the heat they measured.

They lie in the folder that TUNEFLEET_DATA names; without it these tests are skipped.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from device_profiles.schema import DeviceProfile
from edge_client.profile import measure_profile
from tests.edge_client.small_tree import put

DATA = Path(os.environ.get("TUNEFLEET_DATA", Path(__file__).parents[3] / "shared" / "data"))
BOARDS = DATA / "traces" / "sbc_bench"
LOGS = sorted((BOARDS / "raw").glob("*.txt"))
PARTS = {"Cortex-A53": "0xd03", "Cortex-A57": "0xd07", "Cortex-A72": "0xd08", "Cortex-A76": "0xd0b"}
UNITS_KIB = {"B": 0, "K": 1, "M": 2**10, "G": 2**20}

EXPECTED = {  # kinds with count and clock, where the log has a table of them; memory's bounds, MiB
    "Apple_M1_Pro": ({"unknown": {(2, 2064), (8, 3036)}}, 15_000),
    "Jetson_Nano": ({"Cortex-A57": {(4, 1479)}}, 3_900),
    "Jetson_Xavier_NX": ({"Carmel": {(6, 1907)}}, 7_600),
    "Orange_Pi_Zero_2_Allwinner_H616": ({"Cortex-A53": {(4, 1512)}}, 959),
    "Raspberry_Pi_5_B_BCM2712": ({"Cortex-A76": {(4, 2400)}}, 4_000),
}


def tree(root: Path, log: str) -> Path:
    """Lay out as /proc and /sys what a log prints of lscpu, its table of cores, and free."""
    flags = re.search(r"^Flags:\s*(.*)$", log, re.MULTILINE)
    count = re.search(r"^CPU\(s\):\s*(\d+)$", log, re.MULTILINE)
    assert flags and count
    table = re.findall(r"^ +(\d+) +\d+ +\d+ +\d+ +(\d+) +(\S.*?) *$", log, re.MULTILINE)
    cpus = table or [(str(index), "", "") for index in range(int(count[1]))]
    files = {"proc/device-tree/model": re.sub(r"^sbc-bench \S+ | \(.*", "", log.splitlines()[0])}
    blocks = []
    for index, mhz, kind in cpus:
        named = kind.split(" / ")[0]
        numbers = ("0x4e", "0x004") if "Carmel" in named else ("0x41", PARTS.get(named, ""))
        known = f"CPU implementer\t: {numbers[0]}\nCPU part\t: {numbers[1]}\n" if numbers[1] else ""
        blocks.append(f"processor\t: {index}\nFeatures\t: {flags[1]}\n{known}")
        if mhz:
            folder = f"sys/devices/system/cpu/cpu{index}/cpufreq"
            files[f"{folder}/cpuinfo_max_freq"] = f"{mhz}000\n"
    files["proc/cpuinfo"] = "\n".join(blocks)
    rows = re.findall(r"^(Mem|Swap):\s+(\S+)\s.*?(\S+)$", log, re.MULTILINE)
    kib = {name: (to_kib(total), to_kib(last)) for name, total, last in rows[:2]}
    files["proc/meminfo"] = (
        f"MemTotal: {kib['Mem'][0]} kB\nMemAvailable: {kib['Mem'][1]} kB\n"
        f"SwapTotal: {kib['Swap'][0]} kB\n"
    )
    return put(root, files)


def to_kib(size: str) -> int:
    number, unit = re.fullmatch(r"([0-9.]+)([BKMG])i?", size).groups()  # type: ignore[union-attr]
    return int(float(number) * UNITS_KIB[unit])


@pytest.mark.skipif(not LOGS, reason="no logs of boards here")
@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_board(tmp_path: Path, path: Path) -> None:
    log = path.read_text(errors="replace")
    profile = measure_profile(tree(tmp_path, log))
    assert profile.architecture == ("armv7l" if "armv7l" in log else "aarch64")
    assert "neon" in profile.cpu_features
    assert ("dotprod" in profile.cpu_features) == ("asimddp" in log)
    assert profile.memory.total_mib and profile.memory.available_mib
    assert profile.memory.available_mib < profile.memory.total_mib
    assert profile.accelerators == () and profile.link is None
    name = path.stem.rpartition("__")[0]
    if name not in EXPECTED:
        assert profile.core_count == (6 if "RK3399" in name else 4)
        return
    kinds, least_mib = EXPECTED[name]
    found: dict[str, set[tuple[int, int | None]]] = {}
    for group in profile.cores:
        found.setdefault(group.kind, set()).add((group.count, group.max_mhz))
    assert found == kinds
    assert least_mib <= profile.memory.total_mib <= least_mib * 1.1
    assert profile.board_or_model in log


@pytest.mark.skipif(not LOGS, reason="no logs of boards here")
@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_whole_log_in_every_file_never_crashes(tmp_path: Path, path: Path) -> None:
    log = path.read_text(errors="replace")
    names = (
        "proc/cpuinfo",
        "proc/meminfo",
        "proc/device-tree/model",
        "proc/self/cgroup",
        "proc/net/route",
        "sys/class/thermal/thermal_zone0/temp",
        "sys/class/net/eth0/speed",
        "sys/bus/pci/devices/0/uevent",
    )
    assert isinstance(measure_profile(put(tmp_path, dict.fromkeys(names, log))), DeviceProfile)


@pytest.mark.skipif(not BOARDS.is_dir(), reason="no logs of boards here")
def test_every_temperature_that_boards_measured(tmp_path: Path) -> None:
    zone = "sys/class/thermal/thermal_zone0"
    put(tmp_path, {f"{zone}/type": "soc-thermal"})
    with (BOARDS / "telemetry.csv").open(newline="") as file:
        measured = sorted({row["temp_c"] for row in csv.DictReader(file) if row["temp_c"]})
    assert len(measured) > 100
    for text in measured:
        put(tmp_path, {f"{zone}/temp": f"{round(float(text) * 1000)}\n"})
        found = measure_profile(tmp_path).temperature_c
        assert found == (pytest.approx(float(text)) if 0 < float(text) < 150 else None)
