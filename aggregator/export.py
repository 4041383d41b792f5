"""Write an adapter, the shared one or a device's own, as a PEFT directory with a model card."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from aggregator.card import CARD, model_card
from aggregator.errors import ExportError, StoreError
from aggregator.places import Place, common
from aggregator.store import Store
from aggregator.versions import Versions
from aggregator.view.state import StateView
from protocol.adapter import Adapter
from protocol.errors import BadTensors, os_words
from protocol.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_durably, write_peft
from protocol.messages import Job

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: str
    version: int
    rank: int
    parameters: int
    files: dict[str, int]
    """File in the folder → its size in bytes."""


def export_adapter(
    state: Path, out: Path, *, version: int | None = None, device: str = ""
) -> Exported:
    """Export a version (the newest by default) into a new folder, or over an earlier export.

    With a device it is the device's own adapter, the one it goes on with unless there is a version.

    Raises:
        StoreError: the folder of state holds no job or not that version, or the other one holds
            something else.
        ExportError: the other one can't be written to.
    """
    _check_free(out)
    if not (state / "store.sqlite").is_file():
        raise StoreError(
            f"there is no aggregator's state in {state}; name with --state the folder that "
            "`aggregator serve` had (in a fleet's folder: state/JOB)"
        )
    with closing(Store(state)) as store:
        text = store.job()
        if text is None:
            raise StoreError(f"no job has been served from {state} yet")
        job = Job.model_validate_json(text)
        place = (
            _find_own(store, device, version) if device else common(_find_version(store, version))
        )
        try:
            adapter = Versions(job, store).load_at(place)
        except (OSError, BadTensors) as error:
            raise StoreError(f"{place} in {state} is damaged: {os_words(error)}") from None
    with StateView(state) as view:
        rounds = view.rounds(limit=job.rounds)
    try:
        write_peft(adapter, out, base_model=job.base.name)
        write_durably(out / CARD, model_card(job, place, adapter, rounds).encode())
        files = {name: (out / name).stat().st_size for name in FILES}
    except OSError as error:
        raise ExportError(f"can't write the adapter to {out}: {os_words(error)}") from None
    return Exported(str(out), place.version, adapter.rank, _parameters(adapter), files)


def _check_free(out: Path) -> None:
    """Refuse to mix an adapter with files of another kind."""
    try:
        names = {path.name for path in out.iterdir()}
        mine = {*FILES} if names & {ADAPTER_CONFIG, ADAPTER_WEIGHTS} else set()
        other = sorted(names - mine)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise StoreError(f"{out} is a file; name a folder to write the adapter to") from None
    except OSError as error:
        raise ExportError(f"can't write the adapter to {out}: {os_words(error)}") from None
    if other:
        raise StoreError(
            f"{out} holds something else than an adapter ({other[0]}); name a new folder to write "
            "the adapter to"
        )


def _find_version(store: Store, wanted: int | None) -> int:
    newest = store.round().version
    if store.version(newest) is None:
        raise StoreError(
            f"there is no version in {store.folder} yet: the first is there once `aggregator "
            "serve` has begun the job"
        )
    if wanted is not None and store.version(wanted) is None:
        raise StoreError(f"there is no version {wanted} in {store.folder}; the newest is {newest}")
    return newest if wanted is None else wanted


def _find_own(store: Store, device: str, wanted: int | None) -> Place:
    newest = store.version(_find_version(store, None))
    assert newest is not None, "it has been found"
    number = newest.personal.get(device) if wanted is None else wanted
    kept = store.issued.own_versions(device)
    if number not in kept:
        has = f"kept are {', '.join(map(str, kept))}" if kept else "it goes on with the shared one"
        which = "now" if wanted is None else f"of version {wanted}"
        raise StoreError(f"{device!a} has no adapter of its own {which} in {store.folder}; {has}")
    return Place("personal", number, device)


def _parameters(adapter: Adapter) -> int:
    return sum(factors.a.size + factors.b.size for factors in adapter.layers.values())
