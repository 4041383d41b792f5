"""Uploads that are not whole yet: a file each, whose chunks are written in place as they come.

A chunk is written once, where it stays: when the file is whole it gets its final name. Rows say
what has come, and are committed in between: what has been written is on the disk after `sync`,
which is called before that; what is not needed any more goes with `clear`, which is called after.
"""

from __future__ import annotations

import os
from pathlib import Path

from protocol.messages import UploadManifest


class Parts:
    """Keep the parts of uploads in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: set[Path] = set()
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
        """Give a whole file its final name, in another folder of the same disk, durably.

        Raises:
            OSError: the disk refuses.
        """
        part = self.file(manifest)
        _sync(part)
        self._written.discard(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
        _sync(path.parent)

    def drop(self, manifest: UploadManifest) -> None:
        """Let an upload's part go with the next `clear`, if there is one."""
        self._dropped.add(self.file(manifest))

    def clear(self) -> None:
        """Remove what has been dropped.

        Raises:
            OSError: the disk refuses.
        """
        for path in self._dropped:
            path.unlink(missing_ok=True)
        self._dropped.clear()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
