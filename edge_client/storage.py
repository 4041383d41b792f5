"""What a device keeps on disk, and what is said when it can't: a full disk, a damaged file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_client.errors import StorageError
from protocol.adapter import Adapter
from protocol.database import FULL, DatabaseDamaged
from protocol.files import write_durably, write_peft
from protocol.messages import BaseModelInfo

BASE = "base.json"
"""Beside an adapter: which base it is of, by name and hash."""


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


def keep_adapter(adapter: Adapter, folder: Path, base: BaseModelInfo) -> None:
    """Write an adapter where PEFT finds it, with the hash of the base that it is of.

    Raises:
        StorageError: it can't be written.
    """
    with keeping("an adapter", folder.parent):
        write_peft(adapter, folder, base_model=base.name)
        said = {"name": base.name, "sha256": base.sha256}
        write_durably(folder / BASE, json.dumps(said).encode())


def _words(error: OSError, what: str, folder: Path, option: str) -> str:
    if error.errno in FULL:
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
