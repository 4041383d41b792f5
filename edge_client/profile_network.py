"""Read how a Linux device reaches the network, and ask NetworkManager whether that is metered."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from device_profiles.schema import Link
from edge_client.profile_linux import children, read_int, read_text

Kind = Literal["ethernet", "wifi", "cellular", "vpn", "unknown"]

FASTEST_MBIT = 10**6

_KINDS: dict[str, Kind] = {"wlan": "wifi", "wwan": "cellular", "wireguard": "vpn"}

# Names that kernel drivers give, where nothing else tells the kind.
_NAMES: tuple[tuple[str, Kind], ...] = (
    ("wlan", "wifi"),
    ("wwan", "cellular"),
    ("rmnet", "cellular"),
    ("ppp", "cellular"),
    ("tun", "vpn"),
    ("wg", "vpn"),
)


def read_link(root: Path, *, ask_s: float = 0.0) -> Link | None:
    """Describe the interface that has the default route, `None` where none has.

    NetworkManager has `ask_s` to say whether it is metered (0: it is not asked); without its answer
    a cellular link is taken to be metered, as NetworkManager guesses too, and of others nobody
    knows.
    """
    name = default_interface(root)
    if name is None:
        return None
    folder = root / "sys/class/net" / name
    kind = _kind(folder)
    mbit = read_int(folder / "speed")  # wireless and virtual ones have none, or -1
    if mbit is not None and not 0 < mbit <= FASTEST_MBIT:
        mbit = None
    metered = _metered(name, ask_s) if ask_s else None
    if metered is None and kind == "cellular":
        metered = True
    return Link(kind=kind, down_mbit=mbit, up_mbit=mbit, metered=metered)


def default_interface(root: Path) -> str | None:
    """Return the interface of the default route with the lowest metric, IPv4 before IPv6."""
    found: list[tuple[int, str]] = []
    for line in (read_text(root / "proc/net/route") or "").splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000" and fields[6].isdecimal():
            found.append((int(fields[6][:12]), fields[0]))
    if not found:
        for line in (read_text(root / "proc/net/ipv6_route") or "").splitlines():
            fields = line.split()
            if len(fields) == 10 and fields[0] == "0" * 32 and fields[1] == "00":
                found.append((_hexadecimal(fields[5]), fields[9]))
    names = [name for _, name in sorted(found) if name not in ("lo", ".", "..") and "/" not in name]
    return names[0] if names else None


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 2**32


def _kind(folder: Path) -> Kind:
    """Say what kind of interface a folder in /sys/class/net is."""
    names = {path.name for path in children(folder)}
    if names & {"wireless", "phy80211"}:
        return "wifi"
    for line in (read_text(folder / "uevent") or "").splitlines():
        if line.startswith("DEVTYPE="):
            return _KINDS.get(line.removeprefix("DEVTYPE="), "unknown")
    for prefix, kind in _NAMES:
        if folder.name.startswith(prefix):
            return kind
    # ARPHRD_ETHER = 1; only what hangs on a bus has `device`: bridges and container links do not.
    if read_int(folder / "type") == 1 and "device" in names:
        return "ethernet"
    return "unknown"


def _metered(name: str, timeout_s: float) -> bool | None:
    """Ask NetworkManager, where it is; it also says what it guesses, from DHCP and the kind."""
    if shutil.which("nmcli") is None:
        return None
    try:
        done = subprocess.run(
            ["nmcli", "--terse", "--get-values", "GENERAL.METERED", "device", "show", name],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},  # its words are translated otherwise
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    words = done.stdout.split()  # such as "yes (guessed)"
    return {"yes": True, "no": False}.get(words[0]) if words else None
