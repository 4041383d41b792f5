"""What has come of each round and device, kept for the people who run the fleet.

Nothing here decides anything. Rows are small: one an update that counts in a round, one a device
and round that updates are refused in, and one a device for when it was last heard.
"""

from __future__ import annotations

from protocol.bands import parse_band
from protocol.database import Database
from protocol.messages import GlobalManifest, UploadManifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS heard (
  device TEXT PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS counted (
  round INTEGER NOT NULL, device TEXT NOT NULL, rank INTEGER NOT NULL, held INTEGER NOT NULL,
  up_bytes INTEGER NOT NULL, down_bytes INTEGER NOT NULL, loss REAL, at REAL NOT NULL,
  trained INTEGER NOT NULL, PRIMARY KEY (round, device, trained)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS counted_of ON counted (device, round);
CREATE TABLE IF NOT EXISTS refused (
  round INTEGER NOT NULL, device TEXT NOT NULL, times INTEGER NOT NULL, reason TEXT NOT NULL,
  at REAL NOT NULL, PRIMARY KEY (round, device)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS refused_of ON refused (device, round);
CREATE TABLE IF NOT EXISTS times (
  round INTEGER PRIMARY KEY, opened REAL, merged REAL, note TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE IF NOT EXISTS band_sizes (
  version INTEGER NOT NULL, start INTEGER NOT NULL, bytes INTEGER NOT NULL,
  PRIMARY KEY (version, start)) STRICT, WITHOUT ROWID;
"""
LOSS = "held_out_loss"
"""Metric of an update: the loss of the version that it started from, on the device's text."""


class History:
    """Write it in the store's database, in its transactions; times are in seconds since 1970."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def heard(self, device: str, at: float) -> None:
        """Note that a device has said something new."""
        self._db.run(
            "INSERT INTO heard VALUES (?, ?, ?) ON CONFLICT (device) DO UPDATE SET "
            "last = max(last, excluded.last)",
            device,
            at,
            at,
        )

    def counted(self, manifest: UploadManifest, round_number: int, at: float) -> None:
        """Note an update that counts in a round, which may not be the one that it was trained for.

        What the device has downloaded for it is reckoned: the bands of the version it started from
        that hold its directions. Only the broker knows what it sent.
        """
        down = "(SELECT coalesce(sum(bytes), 0) FROM band_sizes WHERE version = ? AND start < ?)"
        self._db.run(
            f"INSERT OR REPLACE INTO counted VALUES (?, ?, ?, ?, ?, {down}, ?, ?, ?)",
            round_number,
            manifest.device,
            manifest.rank,
            manifest.held,
            manifest.file.bytes,
            manifest.version,
            manifest.held,
            manifest.metrics.get(LOSS),
            at,
            manifest.round,
        )
        self.heard(manifest.device, at)

    def refused(self, device: str, reason: str, at: float) -> None:
        """Note that an update was refused in the round that the job is in."""
        now = "(SELECT coalesce(json_extract(value, '$.number'), 0) FROM meta WHERE key = 'round')"
        self._db.run(
            f"INSERT INTO refused VALUES (coalesce({now}, 0), ?, 1, ?, ?) ON CONFLICT "
            "(round, device) DO UPDATE SET times = times + 1, reason = excluded.reason, "
            "at = excluded.at",
            device,
            reason[:500],
            at,
        )
        self.heard(device, at)

    def opened(self, round_number: int, at: float) -> None:
        self._db.run("INSERT OR IGNORE INTO times (round, opened) VALUES (?, ?)", round_number, at)

    def ended(self, round_number: int, at: float, note: str = "") -> None:
        """Note that a round was merged; or that it ended without, and then `note` says why."""
        self.opened(round_number, at)
        self._db.run(
            "UPDATE times SET merged = ?, note = ? WHERE round = ?", at, note, round_number
        )

    def left(self, first: int, until: int) -> bool:
        """Say whether a round from `first` on, below `until`, ended without a merge."""
        query = "SELECT 1 FROM times WHERE round >= ? AND round < ? AND note != ''"
        return self._db.one(query, first, until) is not None

    def published(self, manifest: GlobalManifest) -> None:
        """Note what the bands of a version weigh."""
        for name, file in manifest.bands.items():
            self._db.run(
                "INSERT OR REPLACE INTO band_sizes VALUES (?, ?, ?)",
                manifest.version,
                parse_band(name).start,
                file.bytes,
            )
