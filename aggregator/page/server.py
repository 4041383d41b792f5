"""The page's server: on a thread of `aggregator serve`, which it never holds up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn

from aggregator.errors import ConfigError
from aggregator.page.app import Served, build_app, look_ahead
from aggregator.page.guard import check_exposure
from aggregator.page.live import Watchers
from aggregator.page.past import Past
from aggregator.web import Certificate, Door, WebServer
from protocol.events import EventLog, Seldom
from protocol.link import in_url

PORT = 8885
CONNECTIONS = 256
IDLE_S = 15
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Where:
    """Where the page is to be found."""

    host: str = "127.0.0.1"
    port: int = PORT
    """0: a free one."""
    certificate: Certificate | None = None
    """Of a page over TLS."""


class PageServer(WebServer):
    """Serve the page for as long as the block lasts."""

    def __init__(self, served: Served, where: Where, events: EventLog) -> None:
        """Take the port.

        Raises:
            ConfigError: it is taken; or others could reach the page, and it has no token or no TLS.
        """
        encrypted = where.certificate is not None
        check_exposure(where.host, token=served.token, encrypted=encrypted)
        seldom, watchers, past = Seldom(events), Watchers(), Past()

        def complain(said: str, error: BaseException | None) -> None:
            why = f"a mistake in the page: {error!r}" if error else said
            seldom.emit(("page", why[:80]), "page", reason=why[:400])

        def beside(server: uvicorn.Server) -> Sequence[Coroutine[Any, Any, object]]:
            return _let_go(server, watchers), served.reader.ask(partial(look_ahead, past))

        super().__init__(
            "page",
            build_app(served, watchers, past),
            Door(_listen(where.host, where.port), CONNECTIONS),
            complain,
            certificate=where.certificate,
            idle_s=IDLE_S,
            beside=beside,
        )
        host = "localhost" if where.host in LOOPBACK else in_url(where.host.strip("[]"))
        self.url = f"http{'s' * encrypted}://{host}:{self.port}"
        """Where a browser on this computer finds it."""


async def _let_go(server: uvicorn.Server, watchers: Watchers) -> None:
    """Send home who watches when the server is to end, or it would wait for them."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    watchers.end()


def names_of(host: str) -> tuple[str, ...]:
    """Return the names that a page on a host of this computer may be asked for by."""
    return (*LOOPBACK, host.strip("[]"))


def _listen(host: str, port: int) -> socket.socket:
    """Listen on one address.

    Raises:
        ConfigError: it is taken, or not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise ConfigError(
            f"can't show the page on {host}, port {port}: {error.strerror or error}; name another "
            "with --page PORT"
        ) from None
