"""The text of devices that train: whose it is, and how it gets to where they do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def text_of(parts: Sequence[Path], index: int) -> Path:
    """Return the text of a device: one part after the other."""
    return parts[index % len(parts)]


def text_files(data: Sequence[Path]) -> list[Path]:
    """Return the files of text, those of folders included, in order."""
    found: list[Path] = []
    for path in data:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


class CarriedText:
    """A file or folder of text; pickled, it takes its files along.

    `files` are their contents by their paths from the parent of `path`; None: they are at `path`.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        self.path, self._files = path, files

    def __reduce__(self) -> tuple[Any, ...]:
        files = self._files
        if files is None:
            path = Path(os.path.abspath(self.path))  # so that no name leads up
            files = {str(p.relative_to(path.parent)): p.read_bytes() for p in text_files([path])}
            return CarriedText, (path, files)
        return CarriedText, (self.path, files)

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Yield a path at which it can be read meanwhile."""
        if self._files is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="tunefleet-text-") as folder:
            for name, content in self._files.items():
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            yield Path(folder, self.path.name)
