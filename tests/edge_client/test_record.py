"""A recording says how a device fares, line by line, and survives however it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from device_profiles.traces.format import Sample, read_trace
from edge_client.errors import ConfigError, StorageError
from edge_client.record import Rates, Recorded, Recorder, _write, record
from tests.edge_client.small_tree import put

ROUTE = (
    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
)
PI = {
    "proc/stat": "cpu  100 0 0 900 0 0 0 0 0 0\ncpu0 100 0 0 900 0 0 0 0 0 0\n",
    "proc/loadavg": "0.25 0.1 0.0 1/100 1\n",
    "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 2048000 kB\n",
    "proc/net/route": ROUTE,
    "proc/net/dev": "Inter-|\n face |bytes\n  eth0: 1000 1 0 0 0 0 0 0 500 1 0 0 0 0 0 0\n",
    "sys/class/net/eth0/speed": "100\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51000\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/capacity": "81\n",
}
BUSY = {
    "proc/stat": "cpu  175 0 0 925 0 0 0 0 0 0\ncpu0 175 0 0 925 0 0 0 0 0 0\n",
    "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 1024000 kB\n",
    "proc/net/dev": "Inter-|\n  eth0: 251000 1 0 0 0 0 0 0 125500 1 0 0 0 0 0 0\n",
    "sys/class/thermal/thermal_zone0/temp": "81000\n",
    "sys/class/power_supply/BAT0/status": "Charging\n",
}


class Days:
    """Play a device over some seconds: before each wait ends, files of its tree change."""

    def __init__(self, root: Path, *changes: dict[str, str], asleep_s: float = 0.0) -> None:
        self.root, self.changes, self.asleep_s = root, list(changes), asleep_s
        self.now_s = self.awake_s = 1000.0

    def clocks(self) -> tuple[float, float]:
        return self.now_s, self.awake_s

    def wait(self, seconds: float) -> bool:
        if not self.changes:
            return True
        put(self.root, self.changes.pop(0))
        self.now_s += seconds + self.asleep_s
        self.awake_s += seconds
        return False


def recorded(
    folder: Path, days: Days, *, rates: Rates = "port", for_s: float | None = None
) -> tuple[Recorded, list[Sample]]:
    out = folder / "trace.jsonl"
    done = record(
        out,
        Recorder(days.root, 1.0, rates=rates, clock=lambda: days.now_s),
        name="pi",
        profile=None,
        source="a test",
        every_s=1.0,
        for_s=for_s,
        clocks=days.clocks,
        wait=days.wait,
    )
    return done, list(read_trace(out).samples)


def test_samples_are_what_the_system_tells(tmp_path: Path) -> None:
    days = Days(put(tmp_path / "root", PI), BUSY, {"proc/net/route": ROUTE[:40]})
    done, samples = recorded(tmp_path, days)
    assert done == Recorded(3, 2.0)
    assert samples[0] == Sample(
        t=0,
        online=True,
        power="battery",
        battery_percent=81,
        temperature_c=51,
        throttled=None,
        memory_available_mib=2000,
        cpu_load=0.25,
        down_mbit=100,
        up_mbit=100,
        metered=None,
    )
    second = samples[1]
    assert (second.t, second.power, second.temperature_c) == (1, "mains", 81)
    assert second.memory_available_mib == 1000
    assert second.cpu_load == 0.75  # 75 of the 100 ticks since the sample before
    assert (samples[2].online, samples[2].down_mbit) == (False, None)


def test_traffic_is_what_was_counted_since_the_sample_before(tmp_path: Path) -> None:
    root = put(tmp_path / "root", PI)
    anew = {"proc/net/dev": "Inter-|\n  eth0: 10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n"}
    _, samples = recorded(tmp_path, Days(root, BUSY, anew), rates="traffic")
    assert [(s.down_mbit, s.up_mbit) for s in samples] == [(None, None), (2.0, 1.0), (None, None)]


def test_a_system_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    root = put(tmp_path / "root", {"proc/stat": "cpu 1\n"})
    _, (sample,) = recorded(tmp_path, Days(root))
    assert sample == Sample(0.0, online=False)


def test_memory_is_what_the_tightest_group_leaves(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/my.service"
    files = {
        "proc/self/cgroup": "0::/system.slice/my.service\n",
        f"{group}/memory.max": f"{600 << 20}\n",
        f"{group}/memory.current": f"{100 << 20}\n",
        f"{group}/memory.stat": "inactive_file 0\n",
    }
    fuller = {f"{group}/memory.current": f"{400 << 20}\n"}
    freed = {f"{group}/memory.max": "max\n"}  # is seen the next time that it looks for limits
    days = Days(put(tmp_path / "root", PI | files), fuller, freed, *[{}] * 60)
    _, samples = recorded(tmp_path, days)
    left = [sample.memory_available_mib for sample in samples]
    assert left[:3] == [500, 200, 2000] and left[-1] == 2000


def test_a_suspended_device_is_not_online_meanwhile(tmp_path: Path) -> None:
    days = Days(put(tmp_path / "root", PI), {}, asleep_s=600.0)
    _, samples = recorded(tmp_path, days)
    assert [(s.t, s.online) for s in samples] == [(0, True), (1, False), (601, True)]


def test_it_ends_after_the_time_that_was_asked(tmp_path: Path) -> None:
    done, samples = recorded(tmp_path, Days(put(tmp_path / "root", PI), *[{}] * 99), for_s=5)
    assert [sample.t for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert done.samples == 6


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        recorded(tmp_path, Days(put(tmp_path / "root", PI)))
    assert (tmp_path / "trace.jsonl").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error() -> None:
    file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(StorageError, match="No space left"):
        _write(Path("trace.jsonl"), file, "line\n")
    os.close(file)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(*more: str) -> subprocess.Popen[str]:
        root = put(tmp_path / "root", PI)
        command = [sys.executable, "-m", "edge_client", "record", "--every", "0.1"]
        command += ["--root", str(root), "--out", str(tmp_path / "real.jsonl"), *more]
        process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while not lines(tmp_path / "real.jsonl") > 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    return start


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_it_is_ended_the_file_can_be_read(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = start("--profile", "raspberry-pi-4b-4gb")
    process.send_signal(number)
    said, error = process.communicate(timeout=30)
    told: list[str] = []
    trace = read_trace(tmp_path / "real.jsonl", warn=told.append)
    assert len(trace.samples) >= lines(tmp_path / "real.jsonl") - 1 > 2
    assert trace.profile == "raspberry-pi-4b-4gb"
    assert trace.source and "rates are the port's" in trace.source
    if number is not signal.SIGKILL:
        assert process.returncode == 0, error
        assert f"{len(trace.samples)} samples of " in said and "of one core" in said
        assert told == []


def test_without_proc_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "trace.jsonl"
    command = [sys.executable, "-m", "edge_client", "record", "--out", str(out)]
    ended = subprocess.run([*command, "--root", str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: there is no /proc/stat below ")
    assert not out.exists()


def test_a_name_that_no_reader_takes_is_made_one(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("--name", "The kitchen\n")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == ""
    assert read_trace(tmp_path / "real.jsonl").name == "the-kitchen"
