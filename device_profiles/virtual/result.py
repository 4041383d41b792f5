"""What a replay came to, read from its aggregator's store: rounds, versions, what counted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aggregator.store import Store


def read_result(state: Path) -> dict[str, Any]:
    """Return each round's version, its hash and whose updates counted; and the last one's hash.

    A version's hash is of its bands' hashes: equal where every bit of it is.
    """
    store = Store(state)
    try:
        now = store.round()
        rounds = []
        for number in range(1, now.number + 1):
            counted = store.uploads.of_round(number, "counted")
            late = [m.device for m in counted if m.round != number]
            rounds.append(
                {
                    "round": number,
                    "counted": len(counted),
                    "late": len(late),
                    "devices": len({m.device for m in counted}),
                    "ranks": sum(m.rank for m in counted) / len(counted) if counted else None,
                    "bytes": sum(m.file.bytes for m in counted),
                    "updates_sha256": _hash(f"{m.device} {m.file.sha256}" for m in counted),
                    "version": (merged := store.merged_version(number)),
                    "version_sha256": version_hash(store, merged) if merged else None,
                }
            )
        return {
            "state": now.state,
            "version": now.version,
            "adapter_sha256": version_hash(store, now.version),
            "rounds": rounds,
        }
    finally:
        store.close()


def version_hash(store: Store, version: int) -> str | None:
    """Return the hash of a version's bands; None where it is not kept any more."""
    manifest = store.version(version)
    if manifest is None:
        return None
    return _hash(f"{name} {band.sha256}" for name, band in manifest.bands.items())


def _hash(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
