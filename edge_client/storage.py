"""What a device keeps on disk, and what is said when it can't: a full disk, a damaged file."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_client.errors import StorageError
from protocol.adapter import Adapter
from protocol.database import DatabaseDamaged, DatabaseRefused
from protocol.files import write_peft

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_BYTES = 256 * 1024
"""With less than this SQLite may fail in other words than that the disk is full."""


@contextmanager
def keeping(what: str, folder: Path, option: str = "--state") -> Iterator[None]:
    """Say in one line why `what` can't be kept in `folder`, which the owner names with `option`.

    Raises:
        StorageError: something inside the block could not be written, or a database is damaged.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(_words(error, what, folder, option)) from None


def keep_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write an adapter where PEFT finds it.

    Raises:
        StorageError: it can't be written.
    """
    with keeping("an adapter", folder.parent):
        write_peft(adapter, folder, base_model=base_model)


def _words(error: OSError, what: str, folder: Path, option: str) -> str:
    if _is_full(error, folder):
        return (
            f"the disk is full: {what} can't be kept in {folder}; free some space and start again: "
            "nothing that was kept is lost"
        )
    if isinstance(error, DatabaseDamaged):
        return (
            f"{what} in {folder} can't be read: the file is damaged ({error}); bring it back from "
            f"a backup, or begin anew with another {option} folder and another --name"
        )
    return (
        f"{what} can't be kept in {folder} ({error.strerror or error}); name a folder that can be "
        f"written to with {option}"
    )


def _is_full(error: OSError, folder: Path) -> bool:
    if error.errno in _FULL:
        return True
    if not isinstance(error, DatabaseRefused) or isinstance(error, DatabaseDamaged):
        return False
    try:
        return shutil.disk_usage(folder).free < _NO_ROOM_BYTES
    except OSError:
        return False
