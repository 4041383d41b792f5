"""The profiler on small hand-made trees, on nonsense, and on this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles.schema import DeviceProfile, bundled_names, load_profile
from edge_client.profile import measure_profile, native_bf16, slug
from edge_client.profile_cpu import CpuInfo, read_features
from tests.edge_client.small_tree import put

REPOSITORY = Path(__file__).resolve().parents[2]

ARM_CORE = """processor\t: {index}
BogoMIPS\t: 108.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: {part}
"""
X86_THREAD = """processor\t: {index}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) Ultra 5 125U
cpu MHz\t\t: 400.000
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu lm sse2 avx avx2 fma f16c {more}
"""


def arm_cpuinfo(*cores: str, features: str = "fp asimd crc32") -> str:
    return "\n".join(
        ARM_CORE.format(index=i, part=part, features=features) for i, part in enumerate(cores)
    )


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    clocks = {
        f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "1800000\n" for i in range(4)
    }
    return put(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
            "proc/cpuinfo": arm_cpuinfo(*["0xd08"] * 4) + "\nHardware\t: BCM2835\nSerial\t: 1\n",
            "proc/meminfo": "MemTotal: 3885396 kB\nMemAvailable: 3600000 kB\nSwapTotal: 102396 kB",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": "48199",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50000",
            **clocks,
        },
    )


def test_raspberry_pi(pi: Path) -> None:
    profile = measure_profile(pi)
    assert profile.board_or_model == "Raspberry Pi 4 Model B Rev 1.4"
    assert profile.name == "raspberry-pi-4-model-b-rev-1-4"
    assert profile.architecture == "aarch64"
    assert profile.cpu_features == ("neon",)
    assert [(c.kind, c.count, c.max_mhz) for c in profile.cores] == [("Cortex-A72", 4, 1800)]
    assert profile.memory.total_mib == 3794
    assert profile.memory.available_mib == 3515
    assert profile.memory.swap_mib == 99
    assert profile.temperature_c == pytest.approx(48.199)
    assert profile.throttled is False  # 0x50000: it was, it is not now
    assert profile.power.source == "unknown"
    assert profile.storage_free_mib is None and profile.link is None
    assert profile.accelerators == () and profile.execution_providers is None
    assert not native_bf16(profile)


def test_throttled_now(pi: Path) -> None:
    put(pi, {"sys/devices/platform/soc/soc:firmware/get_throttled": "50005"})
    assert measure_profile(pi).throttled is True


def test_under_voltage_without_the_firmware_word(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon1"
    root = put(tmp_path, {f"{chip}/name": "rpi_volt\n", f"{chip}/in0_lcrit_alarm": "0\n"})
    assert measure_profile(root).throttled is False
    put(root, {f"{chip}/in0_lcrit_alarm": "1\n"})
    assert measure_profile(root).throttled is True


def test_temperature_of_a_pc_without_zones(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "sys/class/hwmon/hwmon0/name": "nvme\n",
            "sys/class/hwmon/hwmon0/temp1_input": "90000\n",
            "sys/class/hwmon/hwmon1/name": "k10temp\n",
            "sys/class/hwmon/hwmon1/temp1_input": "61500\n",
            "sys/class/hwmon/hwmon1/temp3_input": "-1\n",
        },
    )
    assert measure_profile(root).temperature_c == 61.5


def test_own_name_becomes_a_slug(pi: Path) -> None:
    assert measure_profile(pi, name="Kitchen Pi").name == "kitchen-pi"


def test_big_little_arm_with_bf16(tmp_path: Path) -> None:
    features = "fp asimd asimdhp asimddp i8mm bf16"
    root = put(
        tmp_path, {"proc/cpuinfo": arm_cpuinfo("0xd80", "0xd80", "0xd81", features=features)}
    )
    profile = measure_profile(root)
    assert {(c.kind, c.count) for c in profile.cores} == {("Cortex-A520", 2), ("Cortex-A720", 1)}
    assert set(profile.cpu_features) == {"neon", "fp16", "dotprod", "i8mm", "bf16"}
    assert native_bf16(profile)


def test_32_bit_arm_of_old_kernels(tmp_path: Path) -> None:
    cpuinfo = (
        "Processor\t: ARMv7 Processor rev 0 (v7l)\nprocessor\t: 0\nBogoMIPS\t: 1.0\n\n"
        "processor\t: 1\nBogoMIPS\t: 1.0\n\nFeatures\t: swp half thumb neon\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xc09\n\nHardware\t: SMDK4x12\n"
    )
    profile = measure_profile(put(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert profile.architecture == "armv7l"
    assert profile.board_or_model == "SMDK4x12"
    assert [(c.kind, c.count) for c in profile.cores] == [("Cortex-A9", 2)]
    assert profile.cpu_features == ("neon",)


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    # Two performance cores of two threads, two efficient ones of one.
    threads = [(0, 0), (1, 0), (2, 4), (3, 4), (4, 8), (5, 9)]
    cpu = "sys/devices/system/cpu"
    battery = "sys/class/power_supply/BAT0"
    return put(
        tmp_path,
        {
            "sys/class/dmi/id/sys_vendor": "LENOVO\n",
            "sys/class/dmi/id/product_name": "21MM\n",
            "sys/class/dmi/id/product_version": "ThinkPad T14 Gen 5\n",
            "proc/cpuinfo": "\n".join(
                X86_THREAD.format(index=i, core=core, more="avx_vnni") for i, core in threads
            ),
            "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\nSwapTotal: 0 kB",
            "sys/devices/cpu_core/cpus": "0-3",
            "sys/devices/cpu_atom/cpus": "4-5",
            **{
                f"{cpu}/cpu{i}/cpufreq/cpuinfo_max_freq": "4300000" if i < 4 else "3600000"
                for i, _ in threads
            },
            f"{battery}/type": "Battery",
            f"{battery}/status": "Discharging",
            f"{battery}/energy_now": "30000000",
            f"{battery}/energy_full": "40000000",
            "sys/class/power_supply/AC/type": "Mains",
            "sys/class/power_supply/AC/online": "0",
            "sys/class/power_supply/mouse/type": "Battery",
            "sys/class/power_supply/mouse/scope": "Device",
            "sys/class/power_supply/mouse/capacity": "5",
            "sys/class/accel/accel0/device/uevent": "DRIVER=intel_vpu\nPCI_ID=8086:7D1D\n",
            "sys/class/drm/card0/device/uevent": "DRIVER=xe\n",
            "sys/class/drm/card0-eDP-1/status": "connected",
            "dev/accel/accel0": "",
        },
    )


def test_laptop_on_battery(laptop: Path) -> None:
    profile = measure_profile(laptop)
    assert profile.board_or_model == "LENOVO ThinkPad T14 Gen 5"
    assert profile.architecture == "x86_64"
    assert profile.cpu_features == ("avx", "avx2", "avx_vnni", "f16c", "fma")
    model = "Intel(R) Core(TM) Ultra 5 125U"
    assert [(c.kind, c.count, c.max_mhz) for c in profile.cores] == [
        (f"{model} P-core", 2, 4300),
        (f"{model} E-core", 2, 3600),
    ]
    assert (profile.power.source, profile.power.battery_percent) == ("battery", 75.0)
    found = [(a.kind, a.name, a.shares_system_memory) for a in profile.accelerators]
    assert found == [("gpu", "Intel graphics (xe)", True), ("npu", "Intel NPU", True)]


def test_laptop_plugged_in(laptop: Path) -> None:
    put(laptop, {"sys/class/power_supply/AC/online": "1"})
    power = measure_profile(laptop).power
    assert (power.source, power.battery_percent) == ("mains", 75.0)


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_native_bf16_on_x86(tmp_path: Path, flag: str) -> None:
    cpuinfo = X86_THREAD.format(index=0, core=0, more=flag)
    profile = measure_profile(put(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert native_bf16(profile)


def test_virtual_machine_without_dmi_or_cpufreq(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "proc/cpuinfo": X86_THREAD.format(index=0, core=0, more=""),
            "sys/class/dmi/id/product_name": "To Be Filled By O.E.M.",
        },
    )
    profile = measure_profile(root)
    assert profile.board_or_model == "Intel(R) Core(TM) Ultra 5 125U"
    assert profile.cores[0].max_mhz == 400


def test_cgroup_v2_limit_is_the_tightest_upwards(pi: Path) -> None:
    put(
        pi,
        {
            "proc/self/cgroup": "0::/system.slice/tunefleet.service\n",
            "sys/fs/cgroup/system.slice/tunefleet.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{700 * 2**20}\n",
            "sys/fs/cgroup/memory.max": f"{900 * 2**20}\n",
        },
    )
    memory = measure_profile(pi).memory
    assert memory.limit_mib == 700
    assert memory.usable_mib == 700


def test_above_memory_high_a_group_crawls(pi: Path) -> None:
    put(
        pi,
        {
            "proc/self/cgroup": "0::/user.slice/a.scope\n",
            "sys/fs/cgroup/user.slice/a.scope/memory.max": f"{900 * 2**20}\n",
            "sys/fs/cgroup/user.slice/memory.high": f"{600 * 2**20}\n",
        },
    )
    assert measure_profile(pi).memory.limit_mib == 600


def test_cgroup_v1_limit_of_a_nested_group(pi: Path) -> None:
    top = "sys/fs/cgroup/memory"
    put(
        pi,
        {
            "proc/self/cgroup": "5:memory:/a/b\n",
            f"{top}/a/b/memory.limit_in_bytes": f"{800 * 2**20}\n",
            f"{top}/a/memory.limit_in_bytes": f"{500 * 2**20}\n",
            f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert measure_profile(pi).memory.limit_mib == 500


def test_cgroup_v1_limit_in_a_container(pi: Path) -> None:
    put(
        pi,
        {
            # The host's path, which is not there inside the container.
            "proc/self/cgroup": "9:cpu,cpuacct:/\n8:memory:/docker/0123abcd\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{512 * 2**20}\n",
        },
    )
    assert measure_profile(pi).memory.limit_mib == 512


@pytest.mark.parametrize(
    ("line", "file_name", "value"),
    [
        ("8:memory:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712"),
        ("0::/a", "sys/fs/cgroup/a/memory.max", "max"),
        ("0::/../../etc", "sys/fs/cgroup/memory.max", "max"),
        ("nonsense", "sys/fs/cgroup/memory.max", "1"),
    ],
)
def test_unlimited_cgroup_is_no_limit(pi: Path, line: str, file_name: str, value: str) -> None:
    put(pi, {"proc/self/cgroup": line, file_name: value})
    assert measure_profile(pi).memory.limit_mib is None


def test_empty_root_is_unknown_and_no_crash(tmp_path: Path) -> None:
    profile = measure_profile(tmp_path)
    assert profile.name == "unknown-device"
    assert profile.architecture == "unknown"
    assert profile.cores == () and profile.cpu_features == ()
    assert profile.memory.total_mib is None and profile.memory.usable_mib is None
    assert profile.temperature_c is None and profile.throttled is None


def test_folders_where_files_should_be(tmp_path: Path) -> None:
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/self/cgroup", "proc/device-tree/model"):
        (tmp_path / name).mkdir(parents=True)
    put(tmp_path, {"sys/class/power_supply": "", "sys/class/thermal": "", "dev": ""})
    assert measure_profile(tmp_path).memory.total_mib is None


NONSENSE = st.one_of(
    st.binary(max_size=200),
    st.text(alphabet="processor:ModelCPUpartFeatures 0123456789x@GHz\n\tkB-", max_size=300).map(
        str.encode
    ),
    st.integers(-(10**30), 10**30).map(lambda number: str(number).encode()),
)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(NONSENSE, min_size=20, max_size=20))
def test_nonsense_in_every_file_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]
) -> None:
    root = tmp_path_factory.mktemp("nonsense")
    put(root, {"sys/class/power_supply/B/type": "Battery", "proc/self/cgroup": "0::/\n1:memory:/"})
    put(root, {"sys/class/drm/card0/device/uevent": "DRIVER=amdgpu"})
    names = (
        "proc/cpuinfo",
        "proc/meminfo",
        "proc/device-tree/model",
        "sys/fs/cgroup/memory.max",
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/class/thermal/thermal_zone0/temp",
        "sys/class/power_supply/B/capacity",
        "sys/class/power_supply/B/status",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
        "sys/devices/cpu_core/cpus",
        "sys/class/drm/card0/device/mem_info_vram_total",
        "sys/devices/platform/soc/soc:firmware/get_throttled",
        "proc/net/route",
        "proc/net/ipv6_route",
        "sys/class/accel/accel0/device/uevent",
        "sys/bus/pci/devices/0000:01:00.0/uevent",
        "sys/bus/usb/devices/1-1/idVendor",
        "proc/driver/nvidia/gpus/0/information",
        "sys/class/hwmon/hwmon0/name",
        "sys/class/hwmon/hwmon0/temp1_input",
    )
    for name, raw in zip(names, contents, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    assert isinstance(measure_profile(root), DeviceProfile)


@given(st.text(max_size=100))
def test_slug_is_always_a_valid_name(title: str) -> None:
    profile = load_profile(bundled_names()[0])
    DeviceProfile.model_validate({**profile.model_dump(), "name": slug(title)})


def test_outside_linux_psutil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr("psutil.sensors_battery", lambda: None, raising=False)
    profile = measure_profile()
    assert profile.board_or_model == "Darwin arm64"
    assert profile.cpu_features == ("neon",)
    assert profile.memory.total_mib and profile.core_count >= 1
    found = [(a.name, a.shares_system_memory) for a in profile.accelerators]
    assert found == [("Apple GPU", True), ("Apple Neural Engine", True)]


def test_battery_outside_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    battery = SimpleNamespace(percent=101, power_plugged=False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr("psutil.sensors_battery", lambda: battery, raising=False)
    power = measure_profile().power
    assert (power.source, power.battery_percent) == ("battery", 100.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc of this machine")
def test_this_machine_is_measured_in_no_time() -> None:
    profile = measure_profile()
    assert profile.memory.total_mib and profile.core_count >= 1
    assert profile.storage_free_mib is not None


def test_importing_the_profiler_is_light() -> None:
    code = (
        "import sys, edge_client.profile\n"
        "heavy = {'torch', 'numpy', 'transformers', 'onnxruntime', 'psutil'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("proc/cpuinfo", "proc/meminfo"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    assert measure_profile(tmp_path).memory.total_mib is None


def test_an_emulated_cpu_has_no_features_of_its_hosts() -> None:
    """User-mode emulation of Arm shows the /proc/cpuinfo of the x86 computer that it runs on."""
    host = CpuInfo(({"processor": "0", "flags": "fpu lm avx2 fma amx_bf16 avx512_bf16"},), {})
    board = CpuInfo(({"processor": "0", "features": "fp asimd asimddp bf16"},), {})
    assert read_features(host, "aarch64") == read_features(host, "armv7l") == ()
    assert read_features(host, "x86_64") == ("amx_bf16", "avx2", "avx512_bf16", "fma")
    assert read_features(board, "aarch64") == ("bf16", "dotprod", "neon")
    assert read_features(board, "x86_64") == ()
