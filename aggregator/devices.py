"""What is known of devices: their keys, how they are, and how they have behaved."""

from __future__ import annotations

import time

from aggregator.history import History
from protocol.database import Database
from protocol.messages import Status

NOT_READY = ("planning", "waiting", "unfit", "stopped")
"""States of a device that no round waits for, nor is opened for."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
  name TEXT PRIMARY KEY, public_key TEXT NOT NULL, status TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS conduct (
  device TEXT PRIMARY KEY, strikes INTEGER NOT NULL, quarantine REAL NOT NULL) STRICT;
"""


class Devices:
    """Hold the devices of one job, in the store's database, whose transactions they are part of."""

    def __init__(self, db: Database, history: History) -> None:
        self._db = db
        self._history = history
        self._ready: set[str] | None = None
        """Who is ready, once that was asked for: asked with each message, it is kept up here."""

    def forget(self) -> None:
        """Ask the database again who is ready: what was noted since is not committed."""
        self._ready = None

    def key(self, device: str) -> str | None:
        row = self._db.one("SELECT public_key FROM devices WHERE name = ?", device)
        return row[0] if row else None

    def set_status(self, status: Status, public_key: str) -> bool:
        """Remember how a device is; return False for a status older than the one known.

        Whose key has changed (which the caller has allowed) counts its starts anew.
        """
        known = self.status(status.device)
        same = self.key(status.device) == public_key
        if known is not None and same and known.boot > status.boot:
            return False
        if known != status:  # one that the broker keeps is heard again with each connection
            self._history.heard(status.device, time.time())
        self._db.run(
            "INSERT INTO devices VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET "
            "status = excluded.status, public_key = excluded.public_key",
            status.device,
            public_key,
            status.model_dump_json(),
        )
        if self._ready is not None:
            ready = status.online and status.state not in NOT_READY
            (self._ready.add if ready else self._ready.discard)(status.device)
        return True

    def status(self, device: str) -> Status | None:
        row = self._db.one("SELECT status FROM devices WHERE name = ?", device)
        return Status.model_validate_json(row[0]) if row else None

    def ready(self) -> set[str]:
        """Return the devices that are online and can train; not to be changed."""
        if self._ready is not None:
            return self._ready
        state = "json_extract(status, '$.state')"
        rows = self._db.rows(
            "SELECT name FROM devices WHERE json_extract(status, '$.online') "
            f"AND {state} NOT IN ({', '.join('?' * len(NOT_READY))})",
            *NOT_READY,
        )
        self._ready = {row[0] for row in rows}
        return self._ready

    def strike(self, device: str, limit: int, until: float) -> bool:
        """Note a refused update, or a flood; at `limit` quarantine begins and True is returned."""
        with self._db.transaction():
            self._db.run(
                "INSERT INTO conduct VALUES (?, 1, 0) "
                "ON CONFLICT (device) DO UPDATE SET strikes = strikes + 1",
                device,
            )
            begun = self._db.run(
                "UPDATE conduct SET strikes = 0, quarantine = ? WHERE device = ? AND strikes >= ?",
                until,
                device,
                limit,
            )
            return begun > 0

    def forgive(self, device: str) -> None:
        """Take one strike back: an update of the device has been counted."""
        self._db.run(
            "UPDATE conduct SET strikes = strikes - 1 WHERE device = ? AND strikes > 0", device
        )

    def quarantine(self, device: str) -> float:
        """Return until when a device is kept out, in seconds since 1970; 0 if it never was."""
        row = self._db.one("SELECT quarantine FROM conduct WHERE device = ?", device)
        return row[0] if row else 0.0

    def quarantined(self, now: float) -> set[str]:
        rows = self._db.rows("SELECT device FROM conduct WHERE quarantine > ?", now)
        return {row[0] for row in rows}
