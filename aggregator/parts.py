"""Uploads that are not whole yet: a file each, whose chunks are written in place as they come.

A chunk is written once, where it stays: when the file is whole it gets its final name. Rows say
what has come, and are committed in between: what has been written is on the disk after `sync`,
which is called before that; files are renamed and removed by `settle`, which is called after. So
rows never say more than the files have, whenever a crash comes.
"""

from __future__ import annotations

import os
from pathlib import Path

from protocol.faults import fault_point
from protocol.messages import UploadManifest


class Parts:
    """Keep the parts of uploads in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: set[Path] = set()
        self._kept: dict[Path, Path] = {}
        self._dropped: set[Path] = set()

    def file(self, manifest: UploadManifest) -> Path:
        """Return where an upload grows: another file for other bytes of the same upload."""
        return self.folder / f"{manifest.upload}-{manifest.file.sha256[:16]}.part"

    def write(self, manifest: UploadManifest, number: int, data: bytes) -> None:
        """Write a chunk in its place.

        Raises:
            OSError: the disk refuses.
        """
        path, offset = self.file(manifest), number * manifest.file.chunk_bytes
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)
        self._written.add(path)
        self._dropped.discard(path)

    def sync(self) -> None:
        """Bring what has been written since the last time to the disk.

        Raises:
            OSError: the disk refuses.
        """
        for path in self._written:
            _sync(path)
        if self._written:
            _sync(self.folder)
        self._written.clear()

    def keep(self, manifest: UploadManifest, path: Path) -> None:
        """Let a whole file have its final name, on the same disk, with the next `settle`."""
        if self.file(manifest).exists():
            self._kept[self.file(manifest)] = path

    def drop(self, manifest: UploadManifest) -> None:
        """Let an upload's part go with the next `settle`, if there is one."""
        self._dropped.add(self.file(manifest))

    def settle(self) -> None:
        """Rename and remove as asked: the rows that want it are committed.

        Raises:
            OSError: the disk refuses.
        """
        for part, path in self._kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
            _sync(path.parent)
            fault_point("aggregator.upload.kept")
        for part in self._dropped:
            part.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Rename and remove nothing: the rows that wanted it are not committed."""
        self._kept.clear()
        self._dropped.clear()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
