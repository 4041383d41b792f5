"""Who belongs to a fleet: tokens, certificates and signing keys, in SQLite.

`aggregator enroll` and `revoke` write here while `aggregator serve` reads, so that the word of the
operator counts at once. Time is a parameter, in seconds since 1970. Connections belong to one
thread; each thread opens its own.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from aggregator.enrol.pem_files import BACKUP
from aggregator.errors import EnrolmentRefused, FolderError
from protocol.database import FULL, Database, DatabaseDamaged

SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
  digest TEXT PRIMARY KEY, device TEXT NOT NULL, expires REAL NOT NULL,
  used_by TEXT NOT NULL DEFAULT '', certificate TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE IF NOT EXISTS devices (
  name TEXT PRIMARY KEY, signing_key TEXT NOT NULL, revoked REAL) STRICT;
CREATE TABLE IF NOT EXISTS certificates (
  serial TEXT PRIMARY KEY, device TEXT NOT NULL, expires REAL NOT NULL, revoked REAL) STRICT;
"""
BUSY_S = 10.0


class TokenUse(NamedTuple):
    """Hold what a token is good for: a device's name, or a certificate given out before."""

    device: str
    certificate: str


class Registry:
    """Open the registry in a fleet's folder, making it if need be.

    Raises, as every method does:
        FolderError: the file is damaged, in use for too long, can't be written, or the disk is
            full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._in_words():
            self._db = Database(path, SCHEMA, self._in_words, busy_s=BUSY_S)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "; make room there" if error.errno in FULL else ""
            if isinstance(error, DatabaseDamaged):
                remedy = f"; {BACKUP}"
            raise FolderError(
                f"can't use the list of devices {self._path}: {error.strerror or error}{remedy}"
            ) from None

    # -- tokens ----------------------------------------------------------------------------------

    def add_token(self, digest: str, device: str, *, expires: float) -> None:
        """Remember a token by its hash; earlier unused ones of the device are worth nothing now."""
        with self._db.transaction():
            self._db.run("DELETE FROM tokens WHERE device = ? AND used_by = ''", device)
            self._db.run(
                "INSERT INTO tokens (digest, device, expires) VALUES (?, ?, ?)",
                digest,
                device,
                expires,
            )

    def check_token(self, digest: str, keys: str, *, now: float) -> TokenUse:
        """Return what a token is good for in the hands of whoever holds these keys.

        A token that was used is good for the same keys again, until it expires: their owner may not
        have had the answer.

        Raises:
            EnrolmentRefused: unknown, expired, or used with other keys.
        """
        row = self._db.one(
            "SELECT device, expires, used_by, certificate FROM tokens WHERE digest = ?", digest
        )
        if row is None:
            raise EnrolmentRefused("there is no such token here, or a newer one has replaced it")
        device, expires, used_by, certificate = row
        if now >= expires:
            raise EnrolmentRefused(
                f"the token for {device} has expired; ask for a new one (aggregator enroll)"
            )
        if used_by and not hmac.compare_digest(used_by, keys):
            raise EnrolmentRefused(
                f"the token for {device} has been used already; if that was not you, tell the "
                "operator to revoke it"
            )
        return TokenUse(device, certificate)

    def admit(
        self,
        digest: str,
        keys: str,
        device: str,
        signing_key: str,
        *,
        certificate: str,
        serial: int,
        expires: float,
    ) -> None:
        """Use a token up: pin the device's signing key and note its certificate, all or nothing.

        Raises:
            EnrolmentRefused: the token went to somebody else meanwhile, or the device is known with
                another signing key and has not been revoked.
        """
        with self._db.transaction():
            taken = self._db.run(
                "UPDATE tokens SET used_by = ?, certificate = ? WHERE digest = ? AND used_by = ''",
                keys,
                certificate,
                digest,
            )
            if taken != 1:
                raise EnrolmentRefused(f"the token for {device} has been used already")
            known = self._db.one("SELECT signing_key, revoked FROM devices WHERE name = ?", device)
            if known is not None and known[1] is None and known[0] != signing_key:
                raise EnrolmentRefused(
                    f"{device} is known with another signing key; if it was set up anew, the "
                    f"operator revokes it first (aggregator revoke {device})"
                )
            self._db.run("INSERT OR REPLACE INTO devices VALUES (?, ?, NULL)", device, signing_key)
            self._db.run(
                "INSERT INTO certificates VALUES (?, ?, ?, NULL)", str(serial), device, expires
            )

    # -- devices ---------------------------------------------------------------------------------

    def signing_key(self, device: str) -> str | None:
        """Return the pinned key of a device that belongs to the fleet now; None for any other."""
        row = self._db.one(
            "SELECT signing_key FROM devices WHERE name = ? AND revoked IS NULL", device
        )
        return row[0] if row else None

    def devices(self) -> set[str]:
        """Return all that belong to the fleet now."""
        rows = self._db.rows("SELECT name FROM devices WHERE revoked IS NULL")
        return {row[0] for row in rows}

    def known(self, device: str) -> bool:
        """Say whether a device has ever been enrolled, or has a token."""
        query = "SELECT 1 FROM devices WHERE name = ? UNION SELECT 1 FROM tokens WHERE device = ?"
        return self._db.one(query, device, device) is not None

    def revoke(self, device: str, *, now: float) -> bool:
        """Put a device out: its key, its certificates and its tokens count for nothing.

        Returns whether it had ever joined.
        """
        with self._db.transaction():
            self._db.run("DELETE FROM tokens WHERE device = ?", device)
            self._db.run(
                "UPDATE devices SET revoked = ? WHERE name = ? AND revoked IS NULL", now, device
            )
            self._db.run(
                "UPDATE certificates SET revoked = ? WHERE device = ? AND revoked IS NULL",
                now,
                device,
            )
            return self._db.one("SELECT 1 FROM devices WHERE name = ?", device) is not None

    def revoked_serials(self) -> list[tuple[int, float]]:
        """Return all revoked certificates and when each was revoked."""
        rows = self._db.rows(
            "SELECT serial, revoked FROM certificates WHERE revoked IS NOT NULL ORDER BY serial"
        )
        return [(int(serial), revoked) for serial, revoked in rows]
