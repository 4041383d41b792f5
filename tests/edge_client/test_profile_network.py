"""The default route's link, and who says whether it is metered."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.schema import Link
from edge_client.profile import measure_profile
from edge_client.profile_network import read_link
from tests.edge_client.small_tree import put

HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
NO_ADDRESS = "0" * 32


def default_route(name: str, metric: int = 0) -> str:
    return f"{name}\t00000000\t0101A8C0\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


def interface(name: str, **files: str) -> dict[str, str]:
    folder = f"sys/class/net/{name}"
    return {
        "proc/net/route": HEAD + default_route(name),
        **{f"{folder}/{file.replace('__', '/')}": text for file, text in files.items()},
    }


@pytest.mark.parametrize(
    ("files", "link"),
    [
        (
            interface("eth0", type="1\n", device__modalias="", speed="1000\n"),
            Link(kind="ethernet", down_mbit=1000, up_mbit=1000),
        ),
        (interface("eth0", type="1\n", speed="10000\n"), Link(down_mbit=10000, up_mbit=10000)),
        (interface("wlp2s0", uevent="DEVTYPE=wlan\n", speed=""), Link(kind="wifi")),
        (interface("wlan0", phy80211__name="phy0", type="1\n"), Link(kind="wifi")),
        (interface("wwan0", uevent="DEVTYPE=wwan\n"), Link(kind="cellular", metered=True)),
        (interface("ppp0", type="512\n"), Link(kind="cellular", metered=True)),
        (interface("wg0", uevent="DEVTYPE=wireguard\n", speed="-1\n"), Link(kind="vpn")),
        (interface("br0", uevent="DEVTYPE=bridge\n", type="1\n"), Link()),
        (interface("odd0", speed="99999999999\n"), Link()),
    ],
)
def test_link(tmp_path: Path, files: dict[str, str], link: Link) -> None:
    assert measure_profile(put(tmp_path, files)).link == link


def test_the_route_with_the_lowest_metric_is_the_one(tmp_path: Path) -> None:
    routes = HEAD + default_route("wwan0", 700) + default_route("eth0", 100)
    root = put(tmp_path, {**interface("eth0", type="1", device__id=""), "proc/net/route": routes})
    link = measure_profile(root).link
    assert link is not None and link.kind == "ethernet"


def test_ipv6_alone(tmp_path: Path) -> None:
    line = f"{NO_ADDRESS} 00 {NO_ADDRESS} 00 fe8{'0' * 29} 00000400 1 0 00000003    wwan0\n"
    lo = f"{NO_ADDRESS} 00 {NO_ADDRESS} 00 {NO_ADDRESS} ffffffff 1 0 00200200       lo\n"
    root = put(tmp_path, {"proc/net/route": HEAD, "proc/net/ipv6_route": lo + line})
    link = measure_profile(root).link
    assert link is not None and link.kind == "cellular"


@pytest.mark.parametrize(
    "route", ["", HEAD, default_route(".."), default_route("a/b"), "eth0\t00000000\n"]
)
def test_no_default_route_is_unknown(tmp_path: Path, route: str) -> None:
    assert measure_profile(put(tmp_path, {"proc/net/route": route})).link is None


@pytest.mark.parametrize(
    ("script", "metered"),
    [
        ("echo yes", True),
        ("echo 'yes (guessed)'", True),
        ("echo no", False),
        ("echo 'no (guessed)'", False),
        ("echo unknown", None),
        ("echo no such device >&2; exit 10", None),
        ("exec sleep 60", None),
        ('[ "$LC_ALL $6" = "C eth0" ] && echo yes', True),
    ],
)
def test_network_manager_says_whether_it_is_metered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, metered: bool | None
) -> None:
    root = put(tmp_path, interface("eth0", type="1\n"))
    program = tmp_path / "programs" / "nmcli"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    link = read_link(root, ask_s=2.0)
    assert link is not None and link.metered is metered
