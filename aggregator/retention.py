"""What the state need not keep: updates of rounds long merged, old versions, what a crash left.

Rows say what is needed; a file that no row needs goes. Rows change in a transaction before that, so
a crash in between leaves files too many, never too few, and the next start takes them away.
"""

from __future__ import annotations

import shutil

from aggregator.store import Store


def tidy(store: Store, keep_versions: int) -> None:
    """Forget all but the newest versions (0: none), and remove the files that nothing needs.

    Updates are kept of the last merged round and of later ones, and of what a rule carries what the
    next round is handed. It is called when no file is being
    written, and after the broker has been told which versions there are.

    Raises:
        StoreError: the disk refuses.
    """
    if keep_versions:
        store.forget_versions(keep_versions)
    updates, versions = store.needed_updates(), store.version_numbers()
    carried = {file.name for file in store.carried().values()}
    parts = store.needed_parts()
    with store.on_disk():
        for file in store.parts_folder.glob("*"):
            if file not in parts:
                file.unlink(missing_ok=True)
        for file in store.updates_folder.glob("*"):
            if file not in updates:
                file.unlink(missing_ok=True)
        for file in store.memory_folder.glob("*"):
            if file.name not in carried:
                file.unlink(missing_ok=True)
        for folder in store.versions_folder.glob("*"):
            if folder.name not in versions:
                shutil.rmtree(folder)
