"""A version's adapter as a zip of the directory that PEFT loads."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from aggregator.errors import ExportError
from aggregator.export import export_adapter
from protocol.errors import os_words


def adapter_zip(state: Path, name: str, *, version: int, device: str = "") -> Path:
    """Write the archive of a version's adapter, or of a device's own, to a file of its own.

    Its files are in the folder `name`. The file is the caller's, to delete.

    Raises:
        StoreError: there is no such version, or its files are damaged.
        ExportError: there is no room for it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="tunefleet-") as place:
            export_adapter(state, Path(place) / name, version=version, device=device)
            return _archive(Path(place) / name)
    except OSError as error:
        raise ExportError(f"can't make the archive: {os_words(error)}") from None


def _archive(folder: Path) -> Path:
    with tempfile.NamedTemporaryFile(prefix="tunefleet-", suffix=".zip", delete=False) as data:
        try:
            with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(folder.iterdir()):
                    archive.write(file, f"{folder.name}/{file.name}")
            data.flush()  # or a full disk is told of no sooner than by closing it
        except BaseException:
            Path(data.name).unlink()
            raise
    return Path(data.name)
