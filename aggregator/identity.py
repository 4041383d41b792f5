"""Whose word devices take: the aggregator's signing key, where there is no fleet's folder.

A device pins the first key it sees, for every job to come. So the key is the user's and not a
job's: each state folder takes one job alone.
"""

from __future__ import annotations

from pathlib import Path

from protocol.files import user_folder
from protocol.signing import SigningKey

KEY_FILE = "aggregator.key"


def default_key() -> Path:
    """Return where this user's key is kept."""
    return user_folder() / KEY_FILE


def signing_key(state: Path, named: Path | None = None) -> SigningKey:
    """Return the key that is named, or that of an older state folder, or the user's own.

    One that is not there yet is made, readable by its owner alone.

    Raises:
        StateError: the file is no key, or can't be read or made.
    """
    kept = state / KEY_FILE  # states once had a key of their own; their devices know that one
    return SigningKey.load_or_create(named or (kept if kept.exists() else default_key()))
