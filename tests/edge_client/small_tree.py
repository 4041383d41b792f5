"""Small /proc, /sys and /dev trees for the profiler's tests."""

from __future__ import annotations

from pathlib import Path


def put(root: Path, files: dict[str, str]) -> Path:
    """Write the files of a small tree under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
