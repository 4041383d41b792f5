"""What a merged round comes to: a common version, and what there is beside it."""

from __future__ import annotations

from collections.abc import Mapping

from aggregator.merge import Merged
from protocol.messages import GlobalManifest

Told = Mapping[str, Mapping[str, object]]
"""Event → its fields."""


class Outcome:
    """Hold a round's result for all; by itself it has nothing beside it.

    A round is finished by its calls in this order: `write`, `commit` in the transaction that
    finishes the round, `told`.
    """

    def __init__(self, merged: Merged) -> None:
        self.merged = merged

    def write(self, manifest: GlobalManifest) -> GlobalManifest:
        """Write what there is beside the common version; return the manifest that says so."""
        return manifest

    def commit(self) -> None:
        """Put what was written into the store."""

    def told(self) -> Told:
        """Return the events that a round is reported by, beside `merged`."""
        return {}
