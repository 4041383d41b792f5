"""What is known of adapters given out beside the common one, and of the trust they came from."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

from aggregator.places import Place
from protocol.database import Database
from protocol.messages import GlobalManifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS issued (
  kind TEXT NOT NULL, version INTEGER NOT NULL, who TEXT NOT NULL, device TEXT NOT NULL,
  manifest TEXT NOT NULL, PRIMARY KEY (kind, version, who)) STRICT;
CREATE TABLE IF NOT EXISTS trust (round INTEGER PRIMARY KEY, matrix TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS trust_state (
  one INTEGER PRIMARY KEY CHECK (one = 1), state TEXT NOT NULL) STRICT;
"""
_PLACES = "SELECT kind, version, who FROM issued"


class TrustMatrix(NamedTuple):
    """Hold how a round's devices were mixed."""

    devices: list[str]
    weights: list[list[float]]
    """(K, K): row i is what the adapter of device i was mixed of."""
    temperatures: dict[str, float]
    """Of the devices that got a mixture; the others have the shares of the common adapter."""
    scores: list[list[float | None]]
    """(K, K): what the weights came from; None where nobody has measured."""


class Issued:
    """Hold it in the store's database, whose transactions it is part of."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, place: Place, device: str, manifest: GlobalManifest) -> None:
        """Note an adapter of a device: its own, its trial, or as a candidate for all."""
        self._db.run(
            "INSERT OR REPLACE INTO issued VALUES (?, ?, ?, ?, ?)",
            *place,
            device,
            manifest.model_dump_json(),
        )

    def manifest(self, place: Place) -> GlobalManifest | None:
        query = "SELECT manifest FROM issued WHERE kind = ? AND version = ? AND who = ?"
        row = self._db.one(query, *place)
        return GlobalManifest.model_validate_json(row[0]) if row else None

    def candidates(self, version: int) -> dict[int, str]:
        """Return whose adapter each candidate of a version is, by its number."""
        query = "SELECT who, device FROM issued WHERE kind = 'candidate' AND version = ?"
        return {int(who): device for who, device in self._db.rows(query, version)}

    def own_versions(self, device: str) -> list[int]:
        """Return the versions of a device's own adapter that are kept, ascending."""
        query = "SELECT version FROM issued WHERE kind = 'personal' AND who = ? ORDER BY version"
        return [row[0] for row in self._db.rows(query, device)]

    def places(self) -> set[Place]:
        return {Place(*row) for row in self._db.rows(_PLACES)}

    def forgettable(self, before: int) -> set[Place]:
        """Return what only an entry in a kept version's manifest can be a reason to keep.

        Those are own adapters whose common version is forgotten, and what was to be tried with a
        version lower than `before`.
        """
        rows = self._db.rows(
            f"{_PLACES} WHERE kind = 'personal' AND version NOT IN (SELECT version FROM versions) "
            "OR kind != 'personal' AND version < ?",
            before,
        )
        return {Place(*row) for row in rows}

    def forget(self, places: Collection[Place]) -> None:
        """Forget adapters; their files stay."""
        with self._db.transaction():
            for place in places:
                self._db.run(
                    "DELETE FROM issued WHERE kind = ? AND version = ? AND who = ?", *place
                )

    # -- trust -----------------------------------------------------------------------------------

    def trust_state(self) -> str | None:
        """Return what the last merge remembers of trust, as JSON."""
        row = self._db.one("SELECT state FROM trust_state")
        return row[0] if row else None

    def set_trust_state(self, state: str) -> None:
        self._db.run("INSERT OR REPLACE INTO trust_state VALUES (1, ?)", state)

    def add_trust(self, round_number: int, matrix: TrustMatrix) -> None:
        self._db.run(
            "INSERT OR REPLACE INTO trust VALUES (?, ?)",
            round_number,
            json.dumps(matrix._asdict(), allow_nan=False),
        )

    def trust(self, round_number: int) -> TrustMatrix | None:
        row = self._db.one("SELECT matrix FROM trust WHERE round = ?", round_number)
        return TrustMatrix(**json.loads(row[0])) if row else None
