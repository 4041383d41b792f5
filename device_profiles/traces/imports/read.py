"""Find the import for a kind of recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from device_profiles.traces.imports.bandwidth import import_bandwidth
from device_profiles.traces.imports.common import Imported
from device_profiles.traces.imports.fedscale import import_fedscale
from device_profiles.traces.imports.flash import import_flash
from device_profiles.traces.imports.sbc_bench import import_sbc_bench

IMPORTS: dict[str, Callable[[Sequence[Path]], Imported]] = {
    "fedscale": import_fedscale,
    "flash": import_flash,
    "sbc-bench": import_sbc_bench,
    "bandwidth": import_bandwidth,
}


def read_recordings(kind: str, paths: Sequence[Path]) -> Imported:
    """Make traces of files of one kind.

    Raises:
        TraceError: a file can't be read, or is not of this kind.
    """
    return IMPORTS[kind](paths)
