"""Bundled profiles load and say where they are from; a wrong name or field is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from device_profiles.errors import ProfileError
from device_profiles.schema import DeviceProfile, Memory, bundled_names, load_profile

SMALLEST = """
name = "tiny"
title = "Tiny"
board_or_model = "Tiny 1"
architecture = "aarch64"
[memory]
total_mib = 512
available_mib = 400
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_boards_we_promise_are_bundled() -> None:
    assert set(bundled_names()) >= {
        "raspberry-pi-3b-plus-1gb",
        "raspberry-pi-4b-2gb",
        "raspberry-pi-4b-4gb",
        "raspberry-pi-5-8gb",
        "jetson-nano-4gb",
        "laptop-16gb",
    }


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_profile_is_whole_and_sourced(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.core_count >= 1
    assert all(group.max_mhz for group in profile.cores)
    memory = profile.memory
    assert memory.total_mib is not None and memory.available_mib is not None
    assert 0 < memory.available_mib < memory.total_mib
    assert profile.link is not None
    assert len(profile.sources) >= 2
    assert all(": " in source for source in profile.sources), "say what each source gave"
    # A source is public: an address or a publication, never a path on somebody's machine.
    local = re.compile(r"(^|\s)(~|\.\.|/(?!proc/|sys/|dev/)\w+)/")
    assert not any(local.search(source) for source in profile.sources)


@pytest.mark.parametrize("name", bundled_names())
def test_no_profile_names_a_rank(name: str) -> None:
    assert "rank" not in load_profile(name).model_dump_json().lower()


def test_memory_of_bundled_boards_is_near_what_is_soldered() -> None:
    for name in bundled_names():
        size = name.rsplit("-", 1)[1]
        nominal_mib = int(size[:-2]) * {"mb": 1, "gb": 1024}[size[-2:]]
        total_mib = load_profile(name).memory.total_mib
        assert total_mib is not None
        # A Pi's GPU and what NVIDIA carves out take up to a fifth.
        assert 0.78 * nominal_mib < total_mib < nominal_mib


def test_every_kind_of_device_is_there_and_most_are_measured() -> None:
    profiles = [load_profile(name) for name in bundled_names()]
    assert len(profiles) >= 16
    assert sum(profile.speed.sevenzip_mips is not None for profile in profiles) >= 16
    kinds = {a.kind for profile in profiles for a in profile.accelerators}
    assert kinds == {"gpu", "npu"}
    assert {profile.power.source for profile in profiles} == {"mains", "battery"}
    assert {profile.architecture for profile in profiles} == {"aarch64", "x86_64"}
    on_battery = {profile.name for profile in profiles if profile.power.source == "battery"}
    assert {name.split("-")[0] for name in on_battery} >= {"phone", "laptop", "chromebook"}


@pytest.mark.parametrize("name", bundled_names())
def test_speed_is_as_its_source_says(name: str) -> None:
    profile = load_profile(name)
    said = " ".join(source for source in profile.sources if source.startswith("ThomasKaiser"))
    numbers = {int(number) for number in re.findall(r"\b\d+\b", said)}
    assert {value for value in profile.speed.model_dump().values() if value} <= numbers


def test_cores_in_one_group_are_no_faster_than_all() -> None:
    for name in bundled_names():
        speed = load_profile(name).speed
        if speed.sevenzip_mips and speed.sevenzip_mips_one_core:
            assert speed.sevenzip_mips_one_core < speed.sevenzip_mips


def test_jetson_gpu_and_laptop_npu_share_memory() -> None:
    (gpu,) = load_profile("jetson-nano-4gb").accelerators
    assert gpu.kind == "gpu" and gpu.shares_system_memory
    laptop = load_profile("laptop-16gb")
    assert [a.shares_system_memory for a in laptop.accelerators if a.kind == "npu"] == [True]
    assert laptop.power.source == "battery"


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("raspberry-pi-9")
    assert "raspberry-pi-9" in str(caught.value)
    assert all(name in str(caught.value) for name in bundled_names())


def test_path_loads_as_text_and_as_path(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    assert load_profile(path) == load_profile(str(path))
    assert load_profile(path).power.source == "unknown"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"gone\.toml: cannot be read"):
        load_profile(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("total_mib = 512", "", "memory.total_mib"),
        ("total_mib = 512", 'total_mib = "much"', "memory.total_mib"),
        ("total_mib = 512", "total_mib = -1", "memory.total_mib"),
        ("total_mib = 512", "total_mib = 512\ntotal_gib = 1", "memory.total_gib"),
        ('name = "tiny"', 'name = "Tiny One"', "name"),
        ('title = "Tiny"', 'title = "Tiny"\nrank = 8', "rank"),
        ('title = "Tiny"', 'title = "Tiny"\ntemperature_c = nan', "temperature_c"),
        ("[memory]", '[power]\nsource = "sun"\n[memory]', "power.source"),
        ("[memory]", '[[cores]]\nkind = "A"\ncount = 0\n[memory]', "cores.0.count"),
    ],
)
def test_wrong_field_is_named_with_its_file(tmp_path: Path, old: str, new: str, field: str) -> None:
    assert old in SMALLEST
    path = write(tmp_path, SMALLEST.replace(old, new))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    assert f"field {field}:" in str(caught.value)


@pytest.mark.parametrize("raw", [b"name = ", b"\xff\xfe\x00", b"= = =", b"\x00"])
def test_bytes_that_are_no_toml_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tiny.toml"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match=r"tiny\.toml"):
        load_profile(path)


def test_profile_is_frozen_and_survives_json() -> None:
    profile = load_profile("raspberry-pi-5-8gb")
    assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile
    with pytest.raises(ValidationError):
        profile.name = "other"  # type: ignore[misc]  # being refused is the point


@pytest.mark.parametrize(
    ("available_mib", "limit_mib", "usable_mib"),
    [(400, None, 400), (400, 300, 300), (400, 500, 400), (None, 300, 300), (None, None, None)],
)
def test_usable_memory_is_the_tighter_bound(
    available_mib: int | None, limit_mib: int | None, usable_mib: int | None
) -> None:
    memory = Memory(total_mib=512, available_mib=available_mib, limit_mib=limit_mib)
    assert memory.usable_mib == usable_mib
