"""A fleet's folder: made once by `aggregator init`, read by everything else.

fleet.json      hosts and ports        ca.pem ca.key        the private CA
mosquitto.conf  acl  crl.pem           server.pem .key      broker and enrolment
devices.sqlite  who is in              aggregator.pem .key  the aggregator at the broker
signing.key     Ed25519, of messages   state/ broker/       what each keeps
systemd/        units                  fleet.toml           settings of the daemon
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import psutil
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, Field, ValidationError

from aggregator.enrol import ca
from aggregator.enrol.pem_files import (
    BACKUP,
    read_bytes,
    read_certificate,
    read_pair,
    read_revocations,
)
from aggregator.enrol.registry import Registry
from aggregator.errors import FolderError
from protocol.enrolment import Token
from protocol.errors import os_words
from protocol.files import PRIVATE, write_durably
from protocol.mistakes import first_mistake
from protocol.signing import SigningKey
from protocol.tls import TlsFiles
from protocol.topics import NAME
from protocol.transport import BrokerAddress

ALWAYS = ("localhost", "127.0.0.1")
"""Hosts of every server certificate, for the aggregator beside its broker."""
HOURS_MAX = 24 * 90
RENEW_BEFORE = timedelta(days=180)


class FleetSettings(BaseModel):
    """Where a fleet's broker and enrolment are to be found; `fleet.json`."""

    hosts: list[str] = Field(min_length=1)
    port: int = Field(8883, ge=1, le=65535)
    enrol_port: int = Field(8884, ge=1, le=65535)
    bind: str = ""
    """Address to listen on; empty: all of this computer's."""

    @property
    def own_address(self) -> str:
        """Return the one address that the broker listens on; empty if it is more than one."""
        if not self.bind or ipaddress.ip_address(self.bind).is_unspecified:
            return ""
        return self.bind


class Membership(NamedTuple):
    """Hold who the aggregator is, and whom it listens to."""

    key: SigningKey
    tls: TlsFiles
    registry: Registry
    jobs: frozenset[str] = frozenset()
    """All that have been served from this folder: devices' statuses in them may stay."""


class FleetFolder:
    """Open a fleet's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            text = (self.path / "fleet.json").read_bytes()
            self.settings = FleetSettings.model_validate_json(text)
        except FileNotFoundError:
            raise FolderError(
                f"there is no fleet in {path}; make one with `aggregator init {path} --host NAME`"
            ) from None
        except OSError as error:
            raise FolderError(f"can't read the fleet: {os_words(error)}") from None
        except ValidationError as error:
            raise FolderError(
                f"{path / 'fleet.json'} is damaged: {first_mistake(error)}; {BACKUP}"
            ) from None

    # -- what is in it ---------------------------------------------------------------------------

    @property
    def tls(self) -> TlsFiles:
        """The aggregator's own certificate."""
        return TlsFiles(
            self.path / "ca.pem", self.path / "aggregator.pem", self.path / "aggregator.key"
        )

    @property
    def server_certificate(self) -> Path:
        return self.path / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.path / "server.key"

    @property
    def broker_here(self) -> BrokerAddress:
        """The broker as the aggregator beside it finds it."""
        return BrokerAddress(self.settings.own_address or ALWAYS[0], self.port, True)

    @property
    def broker_for_devices(self) -> BrokerAddress:
        return BrokerAddress(self.settings.hosts[0], self.port, True)

    @property
    def port(self) -> int:
        return self.settings.port

    def ca_pem(self) -> str:
        return read_bytes(self.path / "ca.pem").decode("ascii", "replace")

    def ca_certificate(self) -> x509.Certificate:
        """Return the CA's certificate, without its key."""
        return read_certificate(self.path / "ca.pem")

    def signing_key(self) -> SigningKey:
        return SigningKey.load(self.path / "signing.key")

    def registry(self) -> Registry:
        return Registry(self.path / "state" / "devices.sqlite")

    def state(self, job: str) -> Path:
        """Where the aggregator keeps a job."""
        return self.path / "state" / job

    def authority(self) -> ca.Authority:
        """Return the CA with its key.

        Raises:
            FolderError: certificate or key is missing, damaged, or they don't belong together.
        """
        certificate, key = read_pair(self.path / "ca.pem", self.path / "ca.key")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FolderError(f"{self.path / 'ca.key'} is not an EC key: {BACKUP}")
        return ca.Authority(certificate, key)

    def renew(self, now: datetime) -> list[str]:
        """Put in order what the broker goes by: certificates and the revocation list; keys stay.

        A certificate, the broker's or the aggregator's, is issued again that ends soon, or that a
        clock which was wrong has given a begin to come; the list is written again that has such a
        begin, is damaged, or lacks somebody who has been revoked. Returns which files; the broker
        has been told to read its own again, if it runs from here.

        Raises:
            FolderError: one of the files that it takes is missing or damaged, or can't be written.
        """
        renewed = []
        start = max(now, self.ca_certificate().not_valid_before_utc)
        for name in ("server.pem", "aggregator.pem"):
            old = read_certificate(self.path / name)
            ends_soon = old.not_valid_after_utc - now < RENEW_BEFORE
            if ends_soon or old.not_valid_before_utc > start:
                self._write(name, ca.pem(self.authority().renewed(old, now)))
                renewed.append(name)
        revoked = self._revoked()
        if not self._revocations_are_good(revoked, start):
            self._write("crl.pem", self.authority().revocations(revoked))
            renewed.append("crl.pem")
        if renewed:
            self.reload_broker()
        return renewed

    def _revoked(self) -> list[tuple[int, datetime]]:
        """Return the serial numbers of revoked certificates, and when each was revoked."""
        registry = self.registry()
        try:
            return [
                (serial, datetime.fromtimestamp(when, timezone.utc))
                for serial, when in registry.revoked_serials()
            ]
        finally:
            registry.close()

    def _revocations_are_good(self, revoked: list[tuple[int, datetime]], now: datetime) -> bool:
        """Say whether the list is this CA's, of no time to come, and has all who are revoked."""
        found, issuer = read_revocations(self.path / "crl.pem"), self.ca_certificate().public_key()
        assert isinstance(issuer, ec.EllipticCurvePublicKey), "the CA's key is EC"
        return (
            found is not None
            and found.is_signature_valid(issuer)
            and found.last_update_utc <= now
            and {entry.serial_number for entry in found} >= {serial for serial, _ in revoked}
        )

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_durably(self.path / name, data, mode=PRIVATE)
        except OSError as error:
            raise FolderError(
                f"can't write {self.path / name}: {error.strerror}; make room there, or mend that "
                "disk"
            ) from None

    def membership(self) -> Membership:
        """Return what the aggregator needs to serve this fleet."""
        jobs = frozenset(path.parent.name for path in self.path.glob("state/*/store.sqlite"))
        return Membership(self.signing_key(), self.tls, self.registry(), jobs)

    @contextmanager
    def served_here(self) -> Iterator[None]:
        """Keep other aggregators out: they would have the same name at the broker.

        Raises:
            FolderError: one is there already, or the folder can't be written.
        """
        try:
            lock = (self.path / "state" / "serve.lock").open("w")
        except OSError as error:
            raise FolderError(f"can't serve {self.path}: {os_words(error)}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderError(
                    f"another aggregator serves {self.path}; one process serves all "
                    "its jobs: aggregator serve -c"
                ) from None
            yield

    # -- who is in -------------------------------------------------------------------------------

    def issue_token(self, device: str, *, hours: float, now: datetime) -> Token:
        """Return a new token for a device, valid once and for so long.

        Raises:
            FolderError: the time is not one, or the CA is not in order, which is to let it in.
        """
        if not 0 < hours <= HOURS_MAX:
            raise FolderError(
                f"--hours {hours:g}: a token is good for some time, up to {HOURS_MAX} hours"
            )
        token = Token.issue(ca.sha256(self.authority().certificate))
        registry = self.registry()
        registry.add_token(token.digest, device, expires=now.timestamp() + hours * 3600)
        registry.close()
        return token

    def revoke(self, device: str, now: datetime) -> bool:
        """Put a device out: first for the aggregator, then on the broker's list.

        Returns whether it had ever joined; if not, it had a token alone, which is worth nothing
        now.

        Raises:
            FolderError: nobody of this name was ever let in; or it is out for the aggregator, and
                the list can't be written.
        """
        registry = self.registry()
        try:
            if not registry.known(device):
                raise FolderError(
                    f"there is no device {device!r} in this fleet, and no token for one: nothing "
                    "is revoked; is the name right?"
                )
            joined = registry.revoke(device, now=now.timestamp())
        finally:
            registry.close()
        try:
            self._write("crl.pem", self.authority().revocations(self._revoked()))
        except FolderError as error:
            raise FolderError(
                f"{device} is out for the aggregator, but the broker still lets it in, for its "
                f"list can't be made: {error}; then revoke it again"
            ) from None
        return joined

    def reload_broker(self) -> int | None:
        """Have the broker that runs from this folder read its CRL again; return its process id.

        None where none runs, or it is not ours to signal.
        """
        try:
            number = int((self.path / "broker" / "mosquitto.pid").read_text())
            process = psutil.Process(number)
            if process.name() != "mosquitto" or not self._runs_from_here(process):
                return None
            os.kill(number, signal.SIGHUP)
        except (OSError, ValueError, psutil.Error):
            return None
        return number

    def _runs_from_here(self, process: psutil.Process) -> bool:
        """Say whether a broker has this folder's settings, by whatever path it was told them."""
        here, told = (self.path / "mosquitto.conf").resolve(), Path(process.cwd())
        return any((told / word).resolve() == here for word in process.cmdline()[1:])


def check_device(name: str) -> str:
    """Return a device's name.

    Raises:
        FolderError: it can't stand in a topic.
    """
    if not re.fullmatch(NAME, name):
        raise FolderError(
            f"{name!r} can't be a device's name: use 1 to 63 small letters, digits and inner dashes"
        )
    return name
