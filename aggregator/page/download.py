"""A version's adapter as a zip of the directory that PEFT loads."""

from __future__ import annotations

import tempfile
import threading
import zipfile
from pathlib import Path

from aggregator.export import export_adapter

_one_at_a_time = threading.Lock()
"""An adapter is whole in memory while it is written."""


def adapter_zip(state: Path, name: str, *, version: int, device: str = "") -> Path:
    """Write the archive of a version's adapter, or of a device's own, to a file of its own.

    Its files are in the folder `name`. The file is the caller's, to delete.

    Raises:
        StoreError: there is no such version, or its files are damaged.
    """
    with _one_at_a_time, tempfile.TemporaryDirectory(prefix="tunefleet-") as place:
        out = Path(place) / name
        export_adapter(state, out, version=version, device=device)
        with tempfile.NamedTemporaryFile(prefix="tunefleet-", suffix=".zip", delete=False) as data:
            try:
                with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
                    for file in sorted(out.iterdir()):
                        archive.write(file, f"{name}/{file.name}")
            except BaseException:
                Path(data.name).unlink()
                raise
    return Path(data.name)
