"""From settings to a page that is served beside a daemon."""

from __future__ import annotations

import importlib.util
import secrets
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aggregator.errors import ConfigError
from protocol.errors import os_words
from protocol.extras import how_to_install
from protocol.files import PRIVATE, write_durably

if TYPE_CHECKING:
    from aggregator.enrol.folder import FleetFolder
    from aggregator.page.health import Health
    from aggregator.settings import PageSettings
    from aggregator.web import Certificate
    from protocol.events import EventLog

PACKAGES = ("fastapi", "uvicorn", "jinja2", "prometheus_client")
TOKEN_FILE = "page.token"
"""Where a fleet's folder has the token, if it has one."""


class Access(NamedTuple):
    """Who may see a page, and how it is shown to them."""

    token: str
    """Empty: it needs none."""
    certificate: Certificate | None
    """None: without TLS."""


def check_page(settings: PageSettings, fleet: FleetFolder | None) -> Access:
    """Return who may see the page that settings ask for.

    Raises:
        ConfigError: a package is missing, a file of the settings can't be used, or others could
            reach the page and it has no token or no TLS.
    """
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        raise ConfigError(f"the page needs an extra; {how_to_install('dashboard')}")
    from aggregator.page.guard import check_exposure

    access = Access(read_token(_token_file(settings, fleet)), _certificate(settings, fleet))
    check_exposure(settings.host, token=access.token, encrypted=access.certificate is not None)
    return access


def open_page(
    stack: ExitStack,
    settings: PageSettings,
    root: Path,
    fleet: FleetFolder | None,
    health: Callable[[], Health],
    events: EventLog,
) -> None:
    """Serve the page of the states below a folder for as long as a stack lasts.

    Raises:
        ConfigError: as `check_page`, or the port is taken.
    """
    token, certificate = check_page(settings, fleet)
    from aggregator.metrics import expose
    from aggregator.page.app import Served
    from aggregator.page.reader import Reader
    from aggregator.page.server import PageServer, Where, names_of

    assert settings.port is not None, "no page is asked for"
    reader = Reader(root)
    stack.callback(reader.close)
    served = Served(
        reader,
        fleet=None if fleet is None else fleet.path,
        token=token,
        encrypted=certificate is not None,
        hosts=None if token else names_of(settings.host),
        health=health,
        metrics=expose,
    )
    where = Where(settings.host, settings.port, certificate)
    server = stack.enter_context(PageServer(served, where, events))
    events.emit("page", url=server.url)


def _certificate(settings: PageSettings, fleet: FleetFolder | None) -> Certificate | None:
    """Return the certificate of the settings; beyond this computer, without one, the fleet's."""
    from aggregator.page.guard import is_loopback
    from aggregator.web import Certificate

    own, key = settings.certificate, settings.certificate_key
    if own is None and key is None:
        if fleet is None or is_loopback(settings.host):
            return None
        own, key = fleet.server_certificate, fleet.server_key
    if own is None or key is None:
        raise ConfigError("page.certificate and page.certificate_key go together: name both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for file in (own, key):
            file.read_bytes()  # what TLS has to say of a file does not name it
        context.load_cert_chain(own, key, password=lambda: "")
    except ssl.SSLError:
        raise ConfigError(
            f"the page can't be shown with {own} and {key}: they are to be a certificate and the "
            "key that belongs to it, in PEM and without a passphrase"
        ) from None
    except OSError as error:
        raise ConfigError(f"can't read the page's certificate: {os_words(error)}") from None
    return Certificate(own, key)


def _token_file(settings: PageSettings, fleet: FleetFolder | None) -> Path | None:
    """Return the file that the token is in: the one of the settings, or of the fleet's folder."""
    if settings.token_file is not None or fleet is None:
        return settings.token_file
    usual = fleet.path / TOKEN_FILE
    return usual if usual.exists() else None


def read_token(file: Path | None) -> str:
    """Return the token of a file; empty without one.

    Raises:
        ConfigError: it can't be read, or is empty.
    """
    if file is None:
        return ""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = os_words(error) if isinstance(error, OSError) else "it is no text"
        raise ConfigError(
            f"can't read the page's token: {why}; `aggregator page-token` makes one"
        ) from None
    if not token:
        raise ConfigError(f"{file} is to hold the page's token, and is empty")
    return token


def make_token(file: Path) -> str:
    """Return the token of a file, which is made if need be and is its owner's alone.

    Raises:
        ConfigError: it can't be written or read.
    """
    if not file.exists():
        try:
            write_durably(file, secrets.token_urlsafe(32).encode() + b"\n", mode=PRIVATE)
        except OSError as error:
            raise ConfigError(f"can't write the page's token: {os_words(error)}") from None
    return read_token(file)
