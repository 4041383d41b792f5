"""Write a version of the shared adapter as the PEFT directory that everybody can load."""

from __future__ import annotations

from pathlib import Path

from aggregator.errors import StoreError
from aggregator.store import Store
from aggregator.versions import Versions
from protocol.errors import BadTensors
from protocol.files import write_peft
from protocol.messages import Job


def export_adapter(state: Path, out: Path, *, version: int | None = None) -> int:
    """Export a version (the newest by default) and return its number.

    Raises:
        StoreError: the folder holds no job, or not that version.
    """
    if not (state / "store.sqlite").is_file():
        raise StoreError(f"there is no aggregator's state in {state}; name it with --state")
    store = Store(state)
    text = store.job()
    if text is None:
        raise StoreError(f"no job has been served from {state} yet")
    job = Job.model_validate_json(text)
    number = store.round().version if version is None else version
    if store.version(number) is None:
        raise StoreError(f"there is no version {number} in {state}")
    try:
        adapter = Versions(job, store).load(number)
    except (OSError, BadTensors) as error:
        raise StoreError(f"version {number} in {state} is damaged: {error}") from None
    try:
        write_peft(adapter, out, base_model=job.base.name)
    except OSError as error:
        raise StoreError(f"can't write the adapter to {out}: {error}") from None
    return number
