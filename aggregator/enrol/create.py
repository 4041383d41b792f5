"""Make a fleet's folder, whole or not at all: `aggregator init`."""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from datetime import datetime
from pathlib import Path

import psutil

from aggregator.enrol import broker_config, ca, units
from aggregator.enrol.folder import ALWAYS, FleetFolder, FleetSettings
from aggregator.enrol.registry import Registry
from aggregator.errors import FolderError
from protocol.errors import os_words
from protocol.files import PRIVATE, write_durably
from protocol.signing import SigningKey

_HOST = r"(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*"
_NUMBER = r"(?:^|\.)[0-9]+$"
"""What ends so is an IPv4 address or a slip: no top-level domain is a number."""


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
    hosts = [*settings.hosts, *ALWAYS, *filter(None, [settings.own_address])]
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
        "crl.pem": authority.revocations([]),
        "acl": broker_config.access_rules(),
        "mosquitto.conf": broker_config.configuration(
            path,
            user,
            bind=settings.bind,
            port=settings.port,
            memory_bytes=psutil.virtual_memory().total // 2,
        ),
        "systemd/tunefleet-aggregator.service": units.aggregator_unit(path, user),
        units.SETTINGS: units.daemon_settings(),
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
        if not _is_address(host) and (not re.fullmatch(_HOST, host) or re.search(_NUMBER, host)):
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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
