"""A small disk of a test's own, on memory, that can be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[str]:
    """Have a disk at a folder for as long as the block lasts; yield why not, where not."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        why = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        yield f"a tmpfs can't be mounted here: {why}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk up to some bytes, as if somebody else had; return what to delete."""
    ballast = disk / f"ballast-{leave}"
    with ballast.open("wb") as file:
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > leave:
            file.write(bytes(min(MIB, free - leave)))
            file.flush()
    return ballast
