"""A fleet's folder: made once by `aggregator init`, read by everything else.

fleet.json      hosts and ports        ca.pem ca.key        the private CA
mosquitto.conf  acl  crl.pem           server.pem .key      broker and enrolment
devices.sqlite  who is in              aggregator.pem .key  the aggregator at the broker
signing.key     Ed25519, of messages   state/ broker/       what each keeps
systemd/        units
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import pwd
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, Field, ValidationError

from aggregator.enrol import broker_config, ca, units
from aggregator.enrol.registry import Registry
from aggregator.errors import FolderError
from aggregator.mistakes import first_mistake
from protocol.enrolment import Token
from protocol.errors import os_words
from protocol.files import PRIVATE, write_durably
from protocol.signing import SigningKey
from protocol.tls import TlsFiles
from protocol.topics import NAME
from protocol.transport import BrokerAddress

ALWAYS = ("localhost", "127.0.0.1")
"""Hosts of every server certificate, for the aggregator beside its broker."""
HOURS_MAX = 24 * 90
RENEW_BEFORE = timedelta(days=180)
_HOST = r"(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*"


class FleetSettings(BaseModel):
    """Where a fleet's broker and enrolment are to be found; `fleet.json`."""

    hosts: list[str] = Field(min_length=1)
    port: int = Field(8883, ge=1, le=65535)
    enrol_port: int = Field(8884, ge=1, le=65535)
    bind: str = ""
    """Address to listen on; empty: all of this computer's."""


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
                f"{path / 'fleet.json'} is damaged: {first_mistake(error)}; bring it back from a "
                "backup"
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
        return BrokerAddress(_own_address(self.settings) or ALWAYS[0], self.port, True)

    @property
    def broker_for_devices(self) -> BrokerAddress:
        return BrokerAddress(self.settings.hosts[0], self.port, True)

    @property
    def port(self) -> int:
        return self.settings.port

    def ca_pem(self) -> str:
        return self._read("ca.pem").decode()

    def signing_key(self) -> SigningKey:
        return SigningKey.load(self.path / "signing.key")

    def registry(self) -> Registry:
        return Registry(self.path / "state" / "devices.sqlite")

    def state(self, job: str) -> Path:
        """Where the aggregator keeps a job."""
        return self.path / "state" / job

    def authority(self) -> ca.Authority:
        """Return the CA with its key."""
        try:
            key = serialization.load_pem_private_key(self._read("ca.key"), None)
        except (ValueError, TypeError) as error:
            raise FolderError(f"the CA's key in {self.path} can't be read: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FolderError(f"the CA key in {self.path} is not an EC key")
        return ca.Authority(self._certificate("ca.pem"), key)

    def renew(self, now: datetime) -> list[str]:
        """Renew the certificates of broker and aggregator that end soon; keys stay.

        Returns which; the broker has been told to read its own again, if it runs from here.
        """
        renewed = []
        for name in ("server.pem", "aggregator.pem"):
            old = self._certificate(name)
            if old.not_valid_after_utc - now < RENEW_BEFORE:
                new = self.authority().renewed(old, now)
                write_durably(self.path / name, ca.pem(new), mode=PRIVATE)
                renewed.append(name)
        if renewed:
            self.reload_broker()
        return renewed

    def _certificate(self, name: str) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(self._read(name))
        except ValueError as error:
            raise FolderError(f"{self.path / name} can't be read: {error}") from None

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise FolderError(f"can't read {self.path / name}: {error.strerror}") from None

    def membership(self) -> Membership:
        """Return what the aggregator needs to serve this fleet."""
        jobs = frozenset(path.parent.name for path in self.path.glob("state/*/store.sqlite"))
        return Membership(self.signing_key(), self.tls, self.registry(), jobs)

    @contextmanager
    def served_here(self) -> Iterator[None]:
        """Keep other aggregators out: they would have the same name at the broker.

        Raises:
            FolderError: one is there already.
        """
        with (self.path / "state" / "serve.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderError(
                    f"another aggregator serves {self.path}; one job at a time"
                ) from None
            yield

    # -- who is in -------------------------------------------------------------------------------

    def issue_token(self, device: str, *, hours: float, now: datetime) -> Token:
        """Return a new token for a device, valid once and for so long.

        Raises:
            FolderError: the time is not one.
        """
        if not 0 < hours <= HOURS_MAX:
            raise FolderError(
                f"--hours {hours:g}: a token is good for some time, up to {HOURS_MAX} hours"
            )
        token = Token.issue(ca.sha256(self._certificate("ca.pem")))
        registry = self.registry()
        registry.add_token(token.digest, device, expires=now.timestamp() + hours * 3600)
        registry.close()
        return token

    def revoke(self, device: str, now: datetime) -> None:
        """Put a device out: first for the aggregator, then on the broker's list.

        Raises:
            FolderError: nobody of this name was ever let in.
        """
        registry = self.registry()
        if not registry.known(device):
            raise FolderError(f"there is no device {device!r} in this fleet")
        registry.revoke(device, now=now.timestamp())
        serials = [
            (serial, datetime.fromtimestamp(when, timezone.utc))
            for serial, when in registry.revoked_serials()
        ]
        registry.close()
        crl = self.authority().revocations(serials, now)
        write_durably(self.path / "crl.pem", crl, mode=PRIVATE)

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


def create_fleet(path: Path, settings: FleetSettings, now: datetime) -> FleetFolder:
    """Make a fleet's folder, readable by its owner alone.

    Everything is made in a folder beside it, which gets its name last: there is no half a fleet.

    Raises:
        FolderError: there is something already, or it can't be written.
    """
    path = path.absolute()
    _check(path, settings)
    making = path.with_name(path.name + ".making")
    try:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        if path.exists():
            raise FolderError(f"{path} is there already; name a folder that is not")
        if making.exists():
            raise FolderError(f"{making} is left from another try; remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        making.mkdir(mode=0o700)
        _fill(making, path, settings, now)
        making.rename(path)
    except OSError as error:
        raise FolderError(f"can't make {path}: {os_words(error)}") from None
    return FleetFolder(path)


def _fill(making: Path, path: Path, settings: FleetSettings, now: datetime) -> None:
    """Write all files of a fleet to `making`; what they say of places is below `path`."""
    authority = ca.Authority.create(f"Tunefleet {settings.hosts[0]}", now)
    hosts = [*settings.hosts, *ALWAYS, *filter(None, [_own_address(settings)])]
    server = authority.server(list(dict.fromkeys(hosts)), now)
    own = authority.client(broker_config.AGGREGATOR, now)
    user = _user()
    secrets = ["ca.key", "signing.key", "aggregator.key", "state"]
    for name in ("broker", "state", "systemd"):
        (making / name).mkdir(mode=0o700)
    for name, key in (("ca", authority.key), ("server", server.key), ("aggregator", own.key)):
        write_durably(making / f"{name}.key", ca.key_pem(key), mode=PRIVATE)
    SigningKey.load_or_create(making / "signing.key")
    Registry(making / "state" / "devices.sqlite").close()
    files: dict[str, str | bytes] = {
        "ca.pem": ca.pem(authority.certificate),
        "server.pem": ca.pem(server.certificate),
        "aggregator.pem": ca.pem(own.certificate),
        "crl.pem": authority.revocations([], now),
        "acl": broker_config.access_rules(),
        "mosquitto.conf": broker_config.configuration(
            path,
            user,
            bind=settings.bind,
            port=settings.port,
            memory_bytes=psutil.virtual_memory().total // 2,
        ),
        "systemd/tunefleet-aggregator.service": units.aggregator_unit(path, user),
        "systemd/mosquitto.service.d/tunefleet.conf": units.mosquitto_drop_in(
            path, user, [path / name for name in secrets]
        ),
        "fleet.json": settings.model_dump_json(indent=1),
    }
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        write_durably(making / name, data, mode=PRIVATE)


def _check(path: Path, settings: FleetSettings) -> None:
    if not str(path).isprintable():
        raise FolderError(f"{str(path)!r} can't stand in a configuration file; name another folder")
    for host in settings.hosts:
        if not _is_address(host) and not re.fullmatch(_HOST, host):
            raise FolderError(
                f"--host {host!r} is neither a host name nor an IP address; give what devices "
                "connect to, without port or mqtts://"
            )
        if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
            raise FolderError(f"--host {host}: no device can connect to that; name this computer")
    if settings.bind and not _is_address(settings.bind):
        raise FolderError(f"--bind {settings.bind!r} is not an IP address of this computer")
    if settings.port == settings.enrol_port:
        raise FolderError("broker and enrolment need a port each; change --port or --enroll-port")


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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _own_address(settings: FleetSettings) -> str:
    """Return the one address that the broker listens on; empty if it is more than one."""
    if not settings.bind or ipaddress.ip_address(settings.bind).is_unspecified:
        return ""
    return settings.bind


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
