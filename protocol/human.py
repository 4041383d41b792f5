"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Return a number of bytes in decimal units with three figures: "512 B", "4.20 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    power = 1
    while count >= 999.5 * 1000**power and power < 4:
        power += 1
    scaled = count / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {'kMGT'[power - 1]}B"


def human_seconds(seconds: float) -> str:
    """Return a duration with its unit: "0.18 s", "42 s", "3 min 20 s", "1 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
