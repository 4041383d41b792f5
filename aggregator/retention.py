"""What the state need not keep: updates of rounds long merged, old versions, what a crash left.

Rows say what is needed; a file that no row needs goes. Rows change in a transaction before that, so
a crash in between leaves files too many, never too few, and the next start takes them away.
"""

from __future__ import annotations

import shutil

from aggregator.places import beside
from aggregator.publish import VERSIONS_KEPT
from aggregator.store import Store


def tidy(store: Store, keep_versions: int) -> None:
    """Forget all but the newest versions (0: none), and remove the files that nothing needs.

    Updates are kept of the last merged round and of later ones, and of what a rule carries what the
    next round is handed; a device's own adapters as long as a kept version names them; what devices
    were given to try as long as it is on the broker. It is called when no file is being written,
    and after the broker has been told which versions there are.

    Raises:
        StoreError: the disk refuses.
    """
    with store.turn():
        store.uploads.finish_keeping()  # another process may have been killed before it could
        _tidy(store, keep_versions)


def _tidy(store: Store, keep_versions: int) -> None:
    if keep_versions:
        store.forget_versions(keep_versions)
    _forget_personal(store)
    updates, versions = store.uploads.needed_files(), store.version_numbers()
    carried = {file.name for file in store.carried().values()}
    parts = store.uploads.needed_parts()
    with store.on_disk():
        for file in store.uploads.parts_folder.glob("*"):
            if file not in parts:
                file.unlink(missing_ok=True)
        for file in store.uploads.folder.glob("*"):
            if file not in updates:
                file.unlink(missing_ok=True)
        for file in store.memory_folder.glob("*"):
            if file.name not in carried:
                file.unlink(missing_ok=True)
        for folder in store.versions_folder.glob("*"):
            if folder.name not in versions:
                shutil.rmtree(folder)
        _remove_personal(store)


def _forget_personal(store: Store) -> None:
    """Forget what no kept version has beside it, and what is not to be tried any more."""
    newest = store.round().version
    old = store.issued.forgettable(newest - VERSIONS_KEPT + 1)
    own = {place for place in old if place.kind == "personal"}
    if own:
        kept = (store.version(int(number)) for number in store.version_numbers())
        own -= {place for manifest in kept if manifest for place in beside(manifest)}
    tried = {place for place in old if place.kind != "personal"}
    store.issued.forget(own | tried)


def _remove_personal(store: Store) -> None:
    """Remove the folders of adapters that are not known any more, or never were."""
    needed = {store.folder / place.folder for place in store.issued.places()}
    for version in store.personal_folder.glob("*"):
        for folder in version.glob("*/*"):
            if folder not in needed:
                shutil.rmtree(folder)
        for empty in [*version.glob("*"), version]:
            if not any(empty.iterdir()):
                empty.rmdir()
