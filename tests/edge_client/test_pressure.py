"""Training pauses before memory runs out, and goes on only when it is calm again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.pressure import CALM_S, Pressure, Reading, is_calm, read_pressure, reason_to_pause

MIB = 1 << 20


def record(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def meminfo(available_mib: int, total_mib: int = 4000) -> str:
    return f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {available_mib * 1024} kB\n"


def psi(some: float, full: float) -> str:
    line = "{} avg10={:.2f} avg60=0.00 avg300=0.00 total=1\n"
    return line.format("some", some) + line.format("full", full)


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (Reading(0, 4000, 3000, 0, 0), ""),
        (Reading(0, 4000, 3000, 2, 6), "everything stood still 6 %"),
        (Reading(0, 4000, 3000, 25, 1), "tasks stood still 25 %"),
        (Reading(0, 4000, 100, 0, 0), "100 MiB available"),
        (Reading(0, 400, 100, 0, 0), ""),
        (Reading(0), ""),
    ],
)
def test_each_sign_of_shortage_is_a_reason_and_says_so(now: Reading, why: str) -> None:
    found = reason_to_pause(None, now)
    assert why in found
    assert bool(found) == bool(why)


def test_memory_that_will_soon_be_gone_is_a_reason_before_it_is() -> None:
    before, now = Reading(0, 4000, 400), Reading(1, 4000, 340)
    assert "60 MiB less each second" in reason_to_pause(before, now)
    slowly = Reading(0, 4000, 345)
    assert not reason_to_pause(slowly, now)
    much = Reading(0, 4000, 3000), Reading(1, 4000, 2000)  # a step that begins
    assert not reason_to_pause(*much)


def test_it_goes_on_only_after_it_was_calm_for_a_while() -> None:
    pressure = Pressure()
    short, between, calm = ((6.0, 30.0), (0.5, 10.0), (0.0, 0.0))

    def said(at_s: float, stalls: tuple[float, float]) -> bool:
        return bool(pressure.take(Reading(at_s, 4000, 3000, stalls[1], stalls[0])))

    assert not said(0, between)  # never was short
    assert said(1, short)
    assert said(2, between)
    assert said(3, calm)
    assert said(3 + CALM_S - 1, calm)
    assert said(3 + CALM_S, between)  # begins anew
    assert said(4 + CALM_S, calm)
    assert said(3 + 2 * CALM_S, calm)
    assert not said(4 + 2 * CALM_S, calm)


def test_room_for_what_training_takes_again_is_part_of_being_calm() -> None:
    now = Reading(0, 4000, 500, 0, 0)
    assert is_calm(now, 200)
    assert not is_calm(now, 300)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 4000))))
def test_it_never_goes_on_while_there_is_a_reason_to_pause(
    series: list[tuple[float, float, float]],
) -> None:
    pressure, before = Pressure(), None
    for at, (some, full, available) in enumerate(series):
        now = Reading(at, 4000, available, some, full)
        said = pressure.take(now)
        assert said or not reason_to_pause(before, now)
        before = now


def test_a_recorded_machine_without_groups(tmp_path: Path) -> None:
    root = record(
        tmp_path,
        {
            "proc/meminfo": meminfo(900),
            "proc/pressure/memory": psi(12.5, 3.25),
            "proc/self/cgroup": "0::/\n",
        },
    )
    assert read_pressure(root, 7.0) == Reading(7.0, 4000, 900, 12.5, 3.25)


def test_a_cgroup_that_is_nearly_full_counts_though_the_machine_has_room(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/fleet"
    root = record(
        tmp_path,
        {
            "proc/meminfo": meminfo(3000),
            "proc/pressure/memory": psi(0, 0),
            "proc/self/cgroup": "0::/user.slice/fleet\n",
            f"{group}/memory.max": f"{1000 * MIB}\n",
            f"{group}/memory.current": f"{980 * MIB}\n",
            f"{group}/memory.stat": f"anon 5\ninactive_file {20 * MIB}\n",
            f"{group}/memory.pressure": psi(31, 9),
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
        },
    )
    now = read_pressure(root, 0.0)
    assert now == Reading(0.0, 1000, 40, 31, 9)
    assert Pressure().take(now)


def test_a_cgroup_of_the_first_version(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/box"
    root = record(
        tmp_path,
        {
            "proc/meminfo": meminfo(3000),
            "proc/self/cgroup": "4:memory:/box\n3:cpu:/\n",
            f"{group}/memory.limit_in_bytes": f"{600 * MIB}\n",
            f"{group}/memory.usage_in_bytes": f"{400 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert read_pressure(root, 0.0) == Reading(0.0, 600, 200, None, None)


@pytest.mark.parametrize("text", ["", "nonsense", "some avg10=x\nfull", "\0\0", "some avg10=9e99"])
def test_what_makes_no_sense_is_unknown_and_no_reason(tmp_path: Path, text: str) -> None:
    names = ("proc/meminfo", "proc/pressure/memory", "proc/self/cgroup")
    now = read_pressure(record(tmp_path, dict.fromkeys(names, text)), 0.0)
    assert now.available_mib is None
    assert not Pressure().take(now)


def test_this_machine_can_be_read() -> None:
    assert read_pressure(Path("/"), 1.0).at_s == 1.0
